"""Attributes of modules that hold a head or channel count, found by what their forward computes.

A forward reads such numbers from `self`. Which ones is not guessed from names: it is the numbers
that stand in the nodes of a module and have changed there. That the forward follows is then
proved by recording it again.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from mvpfx.dims.attention import Attention
from mvpfx.dims.flow import Flow
from mvpfx.dims.reading import VARIES
from mvpfx.program import Program, full_name
from mvpfx.shared_bias import COUNTS

RATIOS = ("num_key_value_groups", "n_rep")
"""Attributes that hold the number of query heads to a key-value head."""
WIDTHS = ("all_head_size",)
"""Attributes that hold a width of all heads where it is the width of the model as well."""


Attributes = dict[tuple[str, str], int]
"""(module, attribute) -> its new value."""


def find_attributes(
    program: Program, flow: Flow, arguments: Mapping[fx.Node, tuple[Any, ...]]
) -> Attributes:
    """(module, attribute) -> its new value, for the modules of a region."""
    written, stayed = _literals(flow, arguments)
    changed, kept = _sizes(flow)
    found = _ratios(program, flow)
    for module_name in sorted(changed):
        name = full_name(flow.region, module_name) if module_name else flow.region
        for attribute, value in _held_numbers(program, name):
            new = written[module_name].get(value, set())
            if not new and value not in stayed[module_name]:
                new = changed[module_name].get(value, set())
                if value in kept[module_name] and attribute not in WIDTHS:
                    continue
            if len(new) == 1 and (value not in stayed[module_name] or attribute in WIDTHS):
                found[name, attribute] = next(iter(new))
    return found


def other_attributes(
    program: Program, flow: Flow, arguments: Mapping[fx.Node, tuple[Any, ...]]
) -> Iterator[Attributes]:
    """Other choices, where some attributes of a module hold the same number: which of them changes
    then shows only when the forward is recorded. Those that are called like a number of heads come
    first.
    """
    first = find_attributes(program, flow, arguments)
    written, _ = _literals(flow, arguments)
    changed, _ = _sizes(flow)
    alike: dict[tuple[str, int], list[str]] = defaultdict(list)
    for module_name in sorted({*written, *changed}):
        name = full_name(flow.region, module_name) if module_name else flow.region
        for attribute, value in _held_numbers(program, name):
            new = written[module_name].get(value, set()) | changed[module_name].get(value, set())
            for number in sorted(new):
                alike[name, number].append(attribute)
    choices = [
        [(name, chosen, new) for chosen in _subsets(attributes)]
        for (name, new), attributes in alike.items()
    ]
    for combination in itertools.product(*choices):
        found = _ratios(program, flow)
        for name, chosen, new in combination:
            found |= {(name, attribute): new for attribute in chosen}
        if found != first:
            yield found


def _subsets(attributes: list[str]) -> list[tuple[str, ...]]:
    """Which of some attributes may change together, the likeliest first."""
    counts = tuple(name for name in attributes if COUNTS.fullmatch(name.lower()))
    sizes = range(1, len(attributes) + 1)
    found = [counts, *(c for size in sizes for c in itertools.combinations(attributes, size)), ()]
    return list(dict.fromkeys(found))


def _held_numbers(program: Program, name: str) -> Iterator[tuple[str, int]]:
    """The whole numbers that a module holds itself; none of a layer, whose follow its weight."""
    module = program.module(name)
    if module is None or (not module._modules and module._parameters):
        return
    for attribute, value in vars(module).items():
        if type(value) is int and not attribute.startswith("_"):
            yield attribute, value


def _ratios(program: Program, flow: Flow) -> Attributes:
    """Numbers of query heads to a key-value head, which stand in no node."""
    found: Attributes = {}
    for step, rule in flow.steps:
        if not isinstance(rule, Attention):
            continue
        query, key, *_ = rule.parts(step)
        ratio = query.kept(1) // key.kept(1)
        name = full_name(flow.region, step.node.meta.get("module", "")).rstrip(".")
        for attribute in RATIOS:
            if ratio * key.shape[1] != query.shape[1] and program.attribute(name, attribute):
                found[name, attribute] = ratio
    return found


def _literals(
    flow: Flow, arguments: Mapping[fx.Node, tuple[Any, ...]]
) -> tuple[dict[str, dict[int, set[int]]], dict[str, set[int]]]:
    """Numbers in the nodes of each module: old -> new, and those that stay."""
    written: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    stayed: dict[str, set[int]] = defaultdict(set)
    for step, _ in flow.steps:
        node = step.node
        path = node.meta.get("module", "")
        old, new = _numbers(node.args), _numbers(arguments.get(node, node.args))
        for before, after in zip(old, new, strict=False):
            if before != after:
                written[path][before].add(after)
            else:
                stayed[path].add(before)
    return written, stayed


def _sizes(flow: Flow) -> tuple[dict[str, dict[int, set[int]]], dict[str, set[int]]]:
    """Sizes that the nodes of each module read or make: old -> new, and those that stay."""
    changed: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    kept: dict[str, set[int]] = defaultdict(set)
    for step, _ in flow.steps:
        path = step.node.meta.get("module", "")
        for value in (*step.inputs, *step.outputs):
            for dim, size in enumerate(value.shape):
                if value.kept(dim) != size:
                    changed[path][size].add(value.kept(dim))
                elif value.fixed[dim] != VARIES:
                    kept[path].add(size)
    return changed, kept


def _numbers(arguments: Any) -> list[int]:
    """The ints in an argument list, in order."""
    if isinstance(arguments, slice):
        return _numbers((arguments.start, arguments.stop))
    if isinstance(arguments, (tuple, list)):
        return [number for item in arguments for number in _numbers(item)]
    return [arguments] if type(arguments) is int else []
