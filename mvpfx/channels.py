"""Channel facts: which channels of an activation are constant, and at what value.

A channel is one index of the last dimension. Facts are followed from the linear layers that make
an activation (a zero row makes the channel the constant `b_i`) through elementwise nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.elementwise import Operation, evaluate, find_operation
from mvpfx.layer import Layer, is_own_call, user_names
from mvpfx.program import Program, full_name
from mvpfx.transformers_types import is_conv1d


@dataclass(frozen=True)
class Channels:
    """Facts of `C` channels: `constant` bool `[C]`, `value` float64 `[C]` where constant."""

    value: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Chain:
    """What lies between the layers that make an activation and the layer that reads it.

    Attributes:
        consumer: the layer that reads.
        nodes: elementwise nodes in graph order.
        producers: the layers whose output features are the channels.
        vectors: per-channel parameters `[C]` that the nodes read, by full name.
        views: view nodes around HF Conv1D that carry the channel count as a literal.
    """

    consumer: Layer
    nodes: tuple[fx.Node, ...]
    producers: tuple[Layer, ...]
    vectors: tuple[str, ...]
    views: tuple[fx.Node, ...]


def find_chain(program: Program, consumer: Layer, layers: Mapping[fx.Node, Layer]) -> Chain | str:
    """Return the chain that feeds `consumer`, or the reason there is none that may be resized."""
    seen: dict[fx.Node, Operation | None] = {}
    producers: dict[fx.Node, Layer] = {}
    vectors: dict[fx.Node, str] = {}
    views: list[fx.Node] = []
    stack = [consumer.input]
    while stack:
        node = stack.pop()
        if node in seen or node in producers or node in vectors:
            continue
        if node in layers:
            producers[node] = layers[node]
        elif node.op == "get_attr":
            vectors[node] = full_name(consumer.region, node.target)
        elif is_conv1d_view(program, node, consumer, layers):
            views.append(node)
            seen[node] = None
            stack.append(node.args[0])  # pyright: ignore[reportArgumentType]
        else:
            operation = find_operation(node, _called(program, consumer.region, node))
            if operation is None:
                return f"its input comes through {_named(node)}, which is not elementwise"
            seen[node] = operation
            stack += node.all_input_nodes
    inside = {*seen, *producers, *vectors}
    reason = _leak(inside, consumer) or _unequal(program, vectors, producers)
    if reason is not None:
        return reason
    order = {node: i for i, node in enumerate(consumer.node.graph.nodes)}
    nodes = tuple(sorted(seen, key=order.__getitem__))
    return Chain(consumer, nodes, tuple(producers.values()), tuple(vectors.values()), tuple(views))


def channel_facts(program: Program, chain: Chain) -> Channels:
    """Return the facts of the channels that the chain's consumer reads."""
    facts: dict[fx.Node, Channels] = {p.node: output_facts(program, p) for p in chain.producers}
    for node in chain.nodes:
        if node in chain.views:
            facts[node] = facts[node.args[0]]  # pyright: ignore[reportArgumentType]
            continue
        operation = find_operation(node, _called(program, chain.consumer.region, node))
        assert operation is not None
        arguments = [_argument_facts(program, chain, facts, a) for a in node.args]
        facts[node] = _apply(operation, node, arguments)
    result = facts[chain.consumer.input]
    return Channels(result.value, result.constant & result.value.isfinite())


def output_facts(program: Program, layer: Layer) -> Channels:
    """Return the facts of a layer's output: a zero row makes the constant `b_i`."""
    weight, bias = layer.weight(program), layer.bias(program)
    value = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return Channels(value.double(), ~weight.any(dim=1))


def _argument_facts(
    program: Program, chain: Chain, facts: Mapping[fx.Node, Channels], argument: Any
) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    if argument in facts:
        return facts[argument]
    value = program.parameter(full_name(chain.consumer.region, argument.target))
    assert value is not None
    vector = value.detach().double()
    return Channels(vector, torch.ones_like(vector, dtype=torch.bool))


def _apply(operation: Operation, node: fx.Node, arguments: list[Any]) -> Channels:
    known = [a for a in arguments if isinstance(a, Channels)]
    values = [a.value if isinstance(a, Channels) else a for a in arguments]
    value = evaluate(operation, node, values)
    constant = torch.stack([k.constant for k in known]).all(dim=0)
    if _is_product(node):
        # A gate that is exactly zero silences its channel whatever the other factor is.
        zero = torch.stack([k.constant & (k.value == 0) for k in known]).any(dim=0)
        value, constant = torch.where(zero, torch.zeros_like(value), value), constant | zero
    return Channels(value, constant)


def _is_product(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return name in ("mul", "rmul", "imul", "multiply")


def _leak(inside: set[fx.Node], consumer: Layer) -> str | None:
    """Say who else reads what the chain computes."""
    for node in inside:
        outside = [u for u in node.users if u not in inside and u is not consumer.node]
        if outside:
            return f"{_named(node)} is also read by {user_names(node)}"
    return None


def _unequal(
    program: Program, vectors: Mapping[fx.Node, str], producers: Mapping[fx.Node, Layer]
) -> str | None:
    if not producers:
        return "its input is not made by a linear layer"
    widths = {p.weight(program).shape[0] for p in producers.values()}
    for name in vectors.values():
        value = program.parameter(name)
        if value is None or value.dim() != 1:
            return f"its input also reads {name}, which is not one value a channel"
        widths.add(value.shape[0])
    if len(widths) > 1:
        return f"its input mixes {' and '.join(map(str, sorted(widths)))} channels"
    return None


def is_conv1d_view(
    program: Program, node: fx.Node, consumer: Layer, layers: Mapping[fx.Node, Layer]
) -> bool:
    """Whether a node is a view in HF Conv1D's forward.

    Its literal follows `nf`, or the size of its input.
    """
    if node.op != "call_method" or node.target not in ("view", "reshape"):
        return False
    source = node.args[0]
    near = consumer if consumer.input is node else None
    if near is None and isinstance(source, fx.Node):
        near = layers.get(source)
    owner = program.module(near.owner) if near is not None else None
    if near is None or owner is None or not is_conv1d(owner):
        return False
    return node.meta.get("module") == near.node.meta.get("module") and is_own_call(near)


def _called(program: Program, region: str, node: fx.Node) -> Any:
    return program.module(full_name(region, node.target)) if node.op == "call_module" else None


def _named(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the region's input"
    return str(getattr(node.target, "__name__", node.target))
