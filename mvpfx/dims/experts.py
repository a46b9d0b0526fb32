"""Each expert's live units first: so a stack is as wide as its widest expert, not as all together.

The hidden units of an expert can stand in any order, if what makes them and what reads them has the
same one. Between the two may be nothing that tells one unit from another.

Shapes: `X` experts, `K` hidden units, `N` rows that make them: `m` for each unit (gate and up).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mvpfx.dims.elementwise import Elementwise
from mvpfx.dims.reading import RESULT, Reading
from mvpfx.dims.rearrangement import Rearrangement, run
from mvpfx.dims.rule import Rule, Step
from mvpfx.dims.stack import Choice, GroupedProduct, Stack, write_units, zero_slices
from mvpfx.dims.value import Known, Value
from mvpfx.nodes import name_of
from mvpfx.program import Program

Lanes = Tensor
"""For each feature of a tensor: the number of the row that makes it."""


@dataclass(eq=False)
class _Walk:
    """What lies between the stacks that make hidden units and the one that reads them."""

    made: list[Stack] = field(default_factory=list[Stack])
    lanes: dict[Value, Lanes] = field(default_factory=dict[Value, Lanes])
    shadows: dict[Value, Value] = field(default_factory=dict[Value, Value])
    same: list[tuple[Lanes, Lanes]] = field(default_factory=list[tuple[Lanes, Lanes]])
    rows: int = 0


def align_experts(program: Program, reading: Reading) -> Iterator[tuple[str, str]]:
    """Write stacks whose live units come first; yields (stack that reads them, what was done)."""
    for step, rule in reading.steps:
        if not isinstance(rule, GroupedProduct):
            continue
        reader = _stack_of(reading, step, 1)
        walk = _walk(reading, step) if reader is not None else None
        table = _table(walk, step) if walk is not None else None
        if reader is None or walk is None or table is None:
            continue
        dead = _dead(walk, step, reader)
        width, widest = dead.shape[1], int((~dead).sum(dim=1).max())
        order = torch.argsort(dead.to(torch.uint8), dim=1, stable=True)
        changed = write_units(program, reader, order, dead, torch.arange(width)[:, None])
        for stack in walk.made:
            own = (table >= stack.first) & (table < stack.first + stack.value.shape[stack.dim])
            part = table[own].view(width, -1) - stack.first
            changed |= write_units(program, stack, order, dead, part)
        if changed:
            each = [int(count) for count in (~dead).sum(dim=1)]
            yield (
                reader.value.name,
                f"experts keep {min(each)} to {widest} of {width} units, live ones first",
            )


def _stack_of(reading: Reading, step: Step, position: int) -> Stack | None:
    """The parameter that a grouped matmul reads, alone, as it is or with its matrices turned."""
    node: object = list(step.values)[position]
    turned = False
    while isinstance(node, fx.Node) and node.op != "get_attr":
        swap = node.target == "transpose" and set(node.args[1:]) in ({-2, -1}, {1, 2})
        if not swap or len(node.users) != 1:
            return None
        turned, node = not turned, node.args[0]
    value = reading.values.get(node) if isinstance(node, fx.Node) else None
    if not isinstance(node, fx.Node) or not isinstance(value, Value) or len(node.users) != 1:
        return None
    if not value.follows or any(reason is not None for reason in value.fixed):
        return None
    return Stack(value, 2 if turned else 1)


def _walk(reading: Reading, last: Step) -> _Walk | None:
    """Follow what `last` multiplies back to the stacks that make it; None where units differ."""
    made_by = {out: (step, rule) for step, rule in reading.steps for out in step.outputs}
    users: dict[Value, set[Step]] = defaultdict(set)
    for step, _ in reading.steps:
        for value in step.inputs:
            users[value].add(step)
    start = next(iter(last.values.values()))
    waiting = [start]
    chain: dict[Step, Rule] = {}
    while waiting:
        value = waiting.pop()
        if value not in made_by:
            return None
        step, rule = made_by[value]
        if step in chain:
            continue
        chain[step] = rule
        if isinstance(rule, (Elementwise, Rearrangement)):
            waiting += step.inputs
    inside = {*chain, last}
    for step in chain:
        for out in step.outputs:
            if not users[out] <= inside or RESULT in out.fixed:
                return None
    walk = _Walk()
    for step, rule in reading.steps:  # in the order of the graph
        if step in chain and not _pass(reading, walk, last, step, rule):
            return None
    return walk if start in walk.lanes else None


def _pass(reading: Reading, walk: _Walk, last: Step, step: Step, rule: Rule) -> bool:
    """Follow rows through one step; whether it treats all units alike."""
    if isinstance(rule, (GroupedProduct, Choice)):
        return _goes_along(last, step) and _start(reading, walk, step, rule)
    if not isinstance(rule, (Elementwise, Rearrangement)) or step.numbers or step.extra:
        return False
    if any(value not in walk.lanes for value in step.inputs):
        return False
    count = next(iter(walk.shadows.values())).shape[0]
    lanes = _combined(walk, step) if isinstance(rule, Elementwise) else _moved(walk, step, count)
    if [len(found) for found in lanes] != [out.shape[-1] for out in step.outputs]:
        return False
    for out, found in zip(step.outputs, lanes, strict=True):
        if len(out.shape) != 2 or len(found.unique()) != len(found):
            return False
        walk.lanes[out], walk.shadows[out] = found, Value.of(out.name, (count, len(found)))
    shadow = Step(
        step.node,
        step.name,
        step.module,
        tuple(walk.shadows[out] for out in step.outputs),
        {node: walk.shadows[value] for node, value in step.values.items()},
    )
    rule.forward(shadow)
    return True


def _combined(walk: _Walk, step: Step) -> list[Lanes]:
    """The rows in the result of an elementwise node: its operands' rows belong together."""
    first, *others = [walk.lanes[value] for value in step.inputs]
    if any(len(other) != len(first) for other in others):
        return []
    walk.same += [(first, other) for other in others]
    return [first]


def _moved(walk: _Walk, step: Step, count: int) -> list[Lanes]:
    """The rows in the results of a rearrangement within each token; none where it is no such."""
    if len(step.values) != 1:
        return []
    ((node, value),) = step.values.items()
    width = len(walk.lanes[value])
    numbers = torch.arange(count * width).view(count, width)
    moved: list[Lanes] = []
    for found in run(step, {node: numbers}, step.node.args):
        if found.dim() != 2 or len(found) != count or not found.numel():
            return []
        inner = found - width * torch.arange(count)[:, None]
        if int(inner.min()) < 0 or int(inner.max()) >= width or bool((inner != inner[0]).any()):
            return []
        moved.append(walk.lanes[value][inner[0]])
    return moved


def _goes_along(last: Step, step: Step) -> bool:
    """Whether a stack is read with the same division of tokens among experts as `last` does."""
    offsets = last.argument(2, "offs")
    if step.name == "_grouped_mm":
        return step.argument(2, "offs") is offsets
    numbers = step.node.args[1]
    for name in ("cumsum", "histc"):
        if not isinstance(offsets, fx.Node) or name_of(offsets) != name:
            return False
        offsets = offsets.args[0]
    counted = offsets.args[0] if isinstance(offsets, fx.Node) and offsets.args else None
    return counted is numbers and isinstance(numbers, fx.Node) and _is_sorted(numbers)


def _is_sorted(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    taken = node.target is operator.getitem and node.args[1] == 0
    return bool(taken) and isinstance(source, fx.Node) and name_of(source) == "sort"


def _start(reading: Reading, walk: _Walk, step: Step, rule: Rule) -> bool:
    """Begin with a stack that makes units, or with a stack of their biases."""
    (out,) = step.outputs
    if isinstance(rule, GroupedProduct):
        stack = _stack_of(reading, step, 1)
        if stack is None:
            return False
        stack.dim = 3 - stack.dim
        zero = zero_slices(stack.value.known.value, stack.dim)
    else:
        stack = Stack(step.inputs[0], 1)
        node = next(iter(step.values))
        if len(stack.value.shape) != 2 or stack.value.fixed[0] or len(node.users) != 1:
            return False
        zero = stack.value.known.value == 0
    stack.first = walk.rows
    walk.rows += out.shape[1]
    walk.made.append(stack)
    walk.lanes[out] = torch.arange(stack.first, walk.rows)
    known = Known(zero, torch.zeros(1, 1, dtype=torch.float64))
    walk.shadows[out] = Value.of(out.name, (zero.shape[0], out.shape[1]), known)
    return True


def _table(walk: _Walk, last: Step) -> Tensor | None:
    """`[K, m]`: the rows that make each unit, in the same roles; None where units differ.

    Rows belong to one unit where they meet in an elementwise node. Their role is the set of
    tensors they reach. Where each tensor holds all rows of a role or none, and roles that meet
    always do, one permutation of units fits every tensor between.
    """
    unit = torch.arange(walk.rows)
    for _ in range(len(walk.same) + 1):
        for one, other in walk.same:
            least = torch.minimum(unit[one], unit[other])
            unit[one], unit[other] = least, least
    read = unit[walk.lanes[next(iter(last.values.values()))]]
    if len(read.unique()) != len(read):
        return None
    role = torch.zeros(walk.rows, len(walk.lanes), dtype=torch.bool)
    for column, lanes in enumerate(walk.lanes.values()):
        role[lanes, column] = True
    for one, other in walk.same:
        role[other] |= role[one]
    _, kind = role.unique(dim=0, return_inverse=True)
    for lanes in walk.lanes.values():
        if len(lanes) != len(kind[lanes].unique()) * len(read):
            return None
    for one, other in walk.same:
        met = torch.stack((kind[one], kind[other])).unique(dim=1)
        if len(met[0].unique()) != met.shape[1]:
            return None
    place = torch.full((walk.rows,), -1)
    place[read] = torch.arange(len(read))
    place = place[unit]
    kinds = int(kind.max()) + 1
    if bool((place < 0).any()) or walk.rows != kinds * len(read):
        return None
    table = torch.full((len(read), kinds), -1)
    table[place, kind] = torch.arange(walk.rows)
    return None if bool((table < 0).any()) else table


def _dead(walk: _Walk, last: Step, reader: Stack) -> Tensor:
    """`[X, K]`: units that are zero in an expert, or that it does not read."""
    hidden = walk.shadows[next(iter(last.values.values()))]
    unread = zero_slices(reader.value.known.value, reader.dim)
    return unread | hidden.known.zero.expand_as(unread)
