"""Choices of heads: a region that gets biases of all heads takes those of the heads it has left.

Before the analysis each of its heads is chosen, in the graph and by the class of the module; what
the analysis removes from the numbers of heads then is a choice of fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from mvpfx.dims.rule import Step, alike, stay
from mvpfx.dims.value import Known, Value
from mvpfx.nodes import name_of
from mvpfx.program import Program, copy_graph, full_name
from mvpfx.shared_bias import (
    COUNTS,
    HEADS,
    KEPT,
    all_heads,
    shared_bias_class,
    takes_shared_bias,
)
from mvpfx.swap import original_class
from mvpfx.torch_private import size_hint

ALL = "others have the biases of all heads too"
_READERS = ("add", "iadd", "__add__", "__iadd__", "add_", "getitem", "__getitem__")


class HeadChoice:
    """`biases.index_select(-3, numbers)`, where the numbers are of heads that are left."""

    def forward(self, step: Step) -> None:
        """Nothing is known; how many heads there are is settled by the numbers."""
        (out,) = step.outputs
        out.known = Known.nothing(len(out.shape))
        out.fixed[HEADS] = None

    def backward(self, step: Step) -> None:
        """All biases are needed where any head's are."""
        biases, _ = step.inputs
        biases.need(step.outputs[0].needed.any())

    def agree(self, step: Step) -> Iterator[Value]:
        """Numbers go with the heads of the result, and the biases stay."""
        (out,), (biases, numbers) = step.outputs, step.inputs
        last = len(out.shape)
        yield from alike([(out, last + HEADS), (numbers, 0)])
        yield from stay([(biases, last + HEADS)], ALL)
        for dim in range(last):
            if dim != last + HEADS:
                yield from alike([(out, dim), (biases, dim)])


def is_head_choice(step: Step) -> bool:
    """Whether a step takes the biases of some heads."""
    index: Any = step.node.args[2] if len(step.node.args) > 2 else None
    taken = step.name == "index_select" and isinstance(index, fx.Node) and len(step.inputs) == 2
    return bool(taken) and str(index.target).rpartition(".")[2] == KEPT


def with_choices(program: Program, region: str) -> Program | None:
    """The program with choices of heads in one region; None where it gets no biases of heads."""
    graph = copy_graph(program.graphs[region])
    found: dict[str, int] = {}
    for node in list(graph.nodes):
        for owner in dict.fromkeys(_readers(node)):
            module = program.module(full_name(region, owner) if owner else region)
            heads = _heads(node, module)
            if heads is None or not takes_shared_bias(module) or owner in found:
                continue
            if node.op != "placeholder" and not _is_computed(node, module):
                continue
            _choose(graph, node, owner)
            found[owner] = heads
    if not found:
        return None
    parameters, attributes = dict(program.parameters), dict(program.attributes)
    for owner, heads in found.items():
        name = full_name(region, owner) if owner else region
        module = program.module(name)
        assert module is not None
        parameters[full_name(name, KEPT)] = all_heads(heads)
        attributes[name, "__class__"] = shared_bias_class(original_class(module))
    graphs = {**program.graphs, region: graph}
    return replace(program, graphs=graphs, parameters=parameters, attributes=attributes)


def _readers(node: fx.Node) -> Iterator[str]:
    """The modules in which something adds a node to scores."""
    for user in node.users:
        adds = name_of(user) in _READERS or getattr(user.target, "role", None) == "attention"
        if adds and "module" in user.meta:
            yield str(user.meta["module"])


def _heads(node: fx.Node, module: nn.Module | None) -> int | None:
    """How many heads a node may have biases of: as many as the module says that it has."""
    value = node.meta.get("val")
    if module is None or not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return None
    heads = size_hint(value.shape[HEADS])
    held = [n for n, v in vars(module).items() if type(v) is int and v == heads]
    return heads if heads > 1 and any(map(COUNTS.fullmatch, held)) else None


def _is_computed(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node is what a layer computes for itself and all others."""
    returned = any(user.op == "output" for user in node.users)
    return returned and hasattr(module, "compute_bias")


def _choose(graph: fx.Graph, node: fx.Node, owner: str) -> None:
    """Let what a module reads of a node be a choice of it, made where its forward makes it."""
    inside = [
        other
        for other in graph.nodes
        if str(other.meta.get("module", "")).startswith(owner) and other.op != "get_attr"
    ]
    place = inside[0] if node.op == "placeholder" else node.next
    target = f"{owner}.{KEPT}" if owner else KEPT
    with graph.inserting_before(place):
        numbers = graph.get_attr(target)
        chosen = graph.call_method("index_select", (node, HEADS, numbers))
    numbers.meta = {"module": owner}
    chosen.meta = {"module": owner, "val": node.meta["val"]}
    for user in list(node.users):
        inner = str(user.meta.get("module", "")).startswith(owner)
        if inner and user is not chosen and user.op != "output":
            user.replace_input_with(node, chosen)
