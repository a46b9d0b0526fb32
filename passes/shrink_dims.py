"""Remove dead channels and dead attention heads, exactly.

A channel is dead where it is a constant (folded into the next bias), or where nothing needs it.
Both the row that makes it and the column that reads it go, and what lies between follows: norms,
views, splits, head counts. A branch all of which is dead costs nothing: its hidden dimension
becomes empty, where its forward runs that way; else one index stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from mvpfx.checks import as_count
from mvpfx.dims.attention import Attention
from mvpfx.dims.choice import with_choices
from mvpfx.dims.experts import align_experts
from mvpfx.dims.flow import HEAD_DIM, Flow, folds_of
from mvpfx.dims.follow import Attributes, find_attributes, other_attributes
from mvpfx.dims.projected_attention import ProjectedAttention
from mvpfx.dims.proof import find_difference
from mvpfx.dims.reading import Reading
from mvpfx.dims.remains import find_remains
from mvpfx.dims.rewrite import make_writable, rewrite
from mvpfx.dims.value import Value
from mvpfx.layer import find_obstacles
from mvpfx.pipeline import Decision, Pass, Record
from mvpfx.program import Program, copy_graph, full_name
from mvpfx.shared_bias import KEPT

CHANNELS = "remove dead channels"
HEADS = "remove dead heads"
EXPERTS = "order units of experts"
TRIES = 24
"""How many choices of attributes are tried in a row without one that fits."""
RETURNED = "in the attention weights that it returns"


@dataclass(frozen=True)
class ShrinkDims(Pass):
    """Make tensors between matmuls smaller, where that changes no result.

    Attributes:
        multiple_of: what sizes are rounded up to a multiple of, by keeping some dead channels.
        returned: whether attention weights that a region returns may lose heads. Whoever calls the
            region must not compute with them; `convert` tries that out.
    """

    name: ClassVar[str] = "shrink_dims"
    requires: ClassVar[tuple[str, ...]] = ("masks_folded",)
    ensures: ClassVar[tuple[str, ...]] = ("masks_folded", "shapes_agree")
    multiple_of: int = 1
    returned: bool = False

    def __post_init__(self) -> None:
        as_count(self.multiple_of, "multiple_of")

    def apply(self, program: Program) -> Iterator[Decision]:
        """Shrink each region, then say what was left in it and why."""
        obstacle = find_obstacles(program)
        for region in program.graphs:
            for name, reason in align_experts(program, Reading(program, region, obstacle)):
                yield Decision(name, EXPERTS, True, reason)
        flows = [Flow(program, region, obstacle) for region in program.graphs]
        tries = TRIES
        for number, flow in enumerate(flows):
            chosen = self._with_choices(program, flow.region)
            if chosen is None:
                flow.solve(self.returned)
                tries = shrink(program, flow, self.multiple_of, tries)
            else:
                flows[number] = chosen
            yield from removals(flows[number])
        for name, reason in find_remains(program, flows):
            yield Decision(name, CHANNELS, False, reason)

    def _with_choices(self, program: Program, region: str) -> Flow | None:
        """Shrink a region that chooses among biases of heads; None where it need not."""
        trial = with_choices(program, region)
        if trial is None:
            return None
        flow = Flow(trial, region, find_obstacles(trial))
        flow.solve(self.returned)
        if not any(v.kept_shape != v.shape for v in flow.parameters.values() if _numbers(v)):
            return None
        shrink(trial, flow, self.multiple_of)
        if not any(v.kept_shape != v.shape for v in flow.parameters.values() if _numbers(v)):
            return None
        program.parameters, program.attributes = trial.parameters, trial.attributes
        program.graphs[region] = trial.graphs[region]
        return flow


def _numbers(value: Value) -> bool:
    """Whether a value holds the numbers of the heads that are left."""
    return value.name.rpartition(".")[2] == KEPT


def shrink(program: Program, flow: Flow, multiple: int, tries: int = TRIES) -> int:
    """Write what may go into the program, less what the region's forward would not follow.

    Args:
        program: is changed.
        flow: solved, of one region.
        multiple: what sizes are rounded up to a multiple of.
        tries: how many choices of attributes to try, where some hold the same number.

    Returns:
        The tries that are left.
    """
    while flow.removes:
        arguments = _settled(flow, multiple)
        found = find_attributes(program, flow, arguments)
        difference = _write(program, flow, arguments, found)
        if difference is None:
            return TRIES
        if flow.keep_one(flow.all_values(), difference[0]):
            continue
        for attributes in itertools.islice(other_attributes(program, flow, arguments), tries):
            tries -= 1
            if _write(program, flow, arguments, attributes) is None:
                return TRIES
        _block(flow, arguments, *difference)
    return tries


def _write(
    program: Program,
    flow: Flow,
    arguments: dict[fx.Node, tuple[object, ...]],
    attributes: Attributes,
) -> tuple[str, fx.Node | None] | None:
    """Write the removal into the program where the region's forward follows; else what does not."""
    trial = replace(
        program,
        graphs={flow.region: copy_graph(program.graphs[flow.region])},
        parameters=dict(program.parameters),
        attributes=dict(program.attributes),
    )
    rewrite(trial, flow, arguments)
    trial.attributes |= attributes
    difference = find_difference(trial, flow.region)
    if difference is None:
        program.parameters, program.attributes = trial.parameters, trial.attributes
        program.graphs[flow.region] = trial.graphs[flow.region]
    return difference


def _settled(flow: Flow, multiple: int) -> dict[fx.Node, tuple[object, ...]]:
    """Round sizes up and take back what cannot be written, until neither changes anything."""
    while True:
        size = flow.size
        flow.round_up(multiple)
        arguments = make_writable(flow)
        if flow.size == size:
            return arguments


def _block(
    flow: Flow, arguments: dict[fx.Node, tuple[object, ...]], reason: str, node: fx.Node | None
) -> None:
    """Leave alone what the region's forward does not follow: as little as helps."""
    steps = [step for step, _ in flow.steps]
    name, module = (node.name, node.meta.get("module", "")) if node is not None else ("", None)
    at_node = [step for step in steps if step.node.name == name]
    in_module = [step for step in steps if step.node.meta.get("module", "") == module]
    written = [step for step in steps if step.node in arguments]
    before = flow.size
    for step in at_node:
        step.whole_groups = True
    flow.settle(at_node)
    for blocked in (at_node, in_module, written, steps):
        if flow.size == before:
            flow.block(blocked, reason)


def narrows_results(records: Sequence[Record]) -> bool:
    """Whether a region returns attention weights of fewer heads."""
    return any(d.reason.endswith(RETURNED) for record in records for d in record.decisions)


def removals(flow: Flow) -> Iterator[Decision]:
    """One decision for each weight that became smaller, and for each attention."""
    folded: dict[str, int] = {}
    for _, fold in folds_of(flow):
        folded[fold.weight.name] = fold.count
    for name, value in flow.parameters.items():
        if value.kept_shape == value.shape or len(value.shape) < 2:
            continue
        sizes = " x ".join(map(str, value.shape)), " x ".join(map(str, value.kept_shape))
        reason = f"{sizes[0]} -> {sizes[1]}"
        if name in folded:
            reason += f", {folded[name]} constants folded into the bias"
        yield Decision(name, CHANNELS, True, reason)
    for step, rule in flow.steps:
        heads = kept = 0
        if isinstance(rule, Attention):
            out = step.outputs[0]
            heads, kept = out.shape[rule.out_heads], out.kept(rule.out_heads)
        elif isinstance(rule, ProjectedAttention):
            heads, kept = rule.heads, rule.kept_heads
        if heads != kept:
            site = full_name(flow.region, step.node.meta.get("module", "")).rstrip(".")
            returned = len(step.outputs) > 1 or step.node.kwargs.get("need_weights") is True
            reason = f"{heads} -> {kept} heads"
            if returned:
                reason += "; returned attention probabilities lose these heads too"
            yield Decision(site, HEADS, True, reason)
    for value in flow.results:
        if value.kept_shape != value.shape:
            heads, kept = value.shape[HEAD_DIM], value.kept(HEAD_DIM)
            yield Decision(flow.region, HEADS, True, f"{heads} -> {kept} heads {RETURNED}")
