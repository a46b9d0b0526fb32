"""Attention heads in a graph: the four layers around one attention, and which heads are dead.

Shapes: `H` query heads, `G` key-value heads (`H = G` without grouped queries), `D` head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mvpfx.layer import Layer, user_names
from mvpfx.program import Program, full_name

_VIEWS = ("view", "reshape", "unflatten")
_MOVES = ("transpose", "permute", "contiguous")
_OUT_MOVES = ("transpose", "contiguous", "reshape", "view", "flatten", "permute")


@dataclass(frozen=True)
class Attention:
    """One attention and its projections; `inner` are the nodes between, whose sizes follow."""

    node: fx.Node
    module_name: str
    query: Layer
    key: Layer
    value: Layer
    output: Layer
    query_heads: int
    value_heads: int
    width: int
    inner: tuple[fx.Node, ...]

    @property
    def layers(self) -> tuple[Layer, Layer, Layer, Layer]:
        """The four projections."""
        return self.query, self.key, self.value, self.output


def find_attentions(
    program: Program, region: str, layers: Mapping[fx.Node, Layer]
) -> list[tuple[fx.Node, Attention | str]]:
    """Return every attention node of a region with its pattern, or the reason it has none."""
    return [
        (node, _match(program, region, node, layers))
        for node in program.graphs[region].nodes
        if is_attention(node)
    ]


def is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention function of transformers or torch's own."""
    leaf = getattr(node.target, "role", None) == "attention"
    return leaf or node.target is F.scaled_dot_product_attention


def dead_heads(program: Program, attention: Attention) -> tuple[Tensor, Tensor]:
    """Return which key-value heads are dead (bool `[G]`), and the constants they leave.

    A query head is dead where its block of the output projection is zero, or where its value
    rows are zero: its value is then the constant `b_v`, and so is the head's output, because
    softmax rows sum to 1. An empty query or key alone is uniform attention and stays. With
    grouped queries a key-value head is dead where its whole group is.

    Returns:
        dead `[G]`, constants float64 `[H * D]` (zero where the head stays).
    """
    heads, groups, width = attention.query_heads, attention.value_heads, attention.width
    block = attention.output.weight(program).any(dim=0).view(heads, width)
    unread = ~block.any(dim=1)
    rows = attention.value.weight(program).any(dim=1).view(groups, width)
    constant = ~rows.any(dim=1).repeat_interleave(heads // groups)
    group_dead = (unread | constant).view(groups, -1).all(dim=1)
    bias = attention.value.bias(program)
    if bias is None:
        bias = attention.value.weight(program).new_zeros(groups * width)
    per_head = bias.double().view(groups, width).repeat_interleave(heads // groups, dim=0)
    gone = group_dead.repeat_interleave(heads // groups) & constant
    return group_dead, (per_head * gone[:, None]).reshape(-1)


def _match(
    program: Program, region: str, node: fx.Node, layers: Mapping[fx.Node, Layer]
) -> Attention | str:
    arguments = _arguments(node)
    if isinstance(arguments, str):
        return arguments
    inner: list[fx.Node] = []
    found: list[Layer] = []
    widths: set[int] = set()
    for name, argument in zip(("query", "key", "value"), arguments, strict=True):
        path = _projection(name, argument, layers)
        if isinstance(path, str):
            return path
        layer, width, nodes = path
        found.append(layer)
        widths.add(width)
        inner += nodes
    out = _output(node, layers)
    if isinstance(out, str):
        return out
    output, out_nodes = out
    width = widths.pop()
    sizes = [layer.weight(program).shape[0] for layer in found]
    if widths or any(size % width for size in sizes) or sizes[1] != sizes[2]:
        return f"query, key and value of {sizes} features do not split into equal heads"
    heads, groups = sizes[0] // width, sizes[2] // width
    module_name, reason = _module(program, region, node)
    reason = reason or _per_head_inputs(node, heads)
    if heads % groups or output.weight(program).shape[1] != heads * width:
        reason = f"{heads} query heads, {groups} key-value heads and the output do not fit"
    if reason is not None:
        return reason
    nodes = (*inner, *out_nodes)
    query, key, value = found
    return Attention(node, module_name, query, key, value, output, heads, groups, width, nodes)


def _arguments(node: fx.Node) -> list[fx.Node] | str:
    first = 1 if getattr(node.target, "role", None) == "attention" else 0
    given: list[Any] = list(node.args[first : first + 3])
    given += [node.kwargs.get(name) for name in ("query", "key", "value")[len(given) :]]
    nodes = [a for a in given if isinstance(a, fx.Node)]
    return nodes if len(nodes) == 3 else "its query, key and value are not plain arguments"


def _projection(
    name: str, node: fx.Node, layers: Mapping[fx.Node, Layer]
) -> tuple[Layer, int, list[fx.Node]] | str:
    """Walk from an attention argument `[B, H, S, D]` back to its linear layer."""
    nodes: list[fx.Node] = []
    width = 0
    while node not in layers:
        if len(node.users) > 1:
            return f"its {name} is also read by {user_names(node)}"
        if node.target in _VIEWS and node.op == "call_method" and not width:
            sizes = _flat_sizes(node)
            if len(sizes) < 2 or sizes[-2] != -1 or not isinstance(sizes[-1], int):
                return f"the view of its {name} holds the head count as a literal: {sizes}"
            width = sizes[-1]
        elif not (node.target in _MOVES and node.op == "call_method"):
            target = getattr(node.target, "__name__", node.target)
            return f"its {name} comes through {target}, not straight from a linear layer"
        nodes.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if len(node.users) > 1:
        return f"its {name} projection is also read by {user_names(node)}"
    if not width:
        return f"its {name} is not split into heads by a view"
    return layers[node], width, nodes


def _output(node: fx.Node, layers: Mapping[fx.Node, Layer]) -> tuple[Layer, list[fx.Node]] | str:
    """Walk from an attention's result to the linear layer that reads it."""
    nodes: list[fx.Node] = []
    current = node
    if getattr(node.target, "role", None) == "attention":
        first = [u for u in node.users if u.args[1] == 0]
        if len(first) != 1:
            return "its result is not read once"
        current = first[0]
        nodes.append(current)
    while True:
        if len(current.users) != 1:
            return f"its result is read by {user_names(current)}"
        user = next(iter(current.users))
        if user in layers and layers[user].input is current:
            return layers[user], nodes
        if user.op != "call_method" or user.target not in _OUT_MOVES:
            target = getattr(user.target, "__name__", user.target)
            return f"its result goes through {target}, not straight to a linear layer"
        if user.target in ("reshape", "view"):
            sizes = _flat_sizes(user)
            if not sizes or sizes[-1] != -1:
                return f"the view of its result holds the head count as a literal: {sizes}"
        nodes.append(user)
        current = user


def _flat_sizes(node: fx.Node) -> list[Any]:
    sizes = node.args[1:]
    if node.target == "unflatten":
        sizes = node.args[2:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return list(sizes)


def _module(program: Program, region: str, node: fx.Node) -> tuple[str, str | None]:
    """Return the name of the attention module, and why its heads may not be removed."""
    first = node.args[0]
    if getattr(node.target, "role", None) != "attention" or not isinstance(first, fx.Node):
        return full_name(region, node.meta.get("module", "")).rstrip("."), None
    name = region if first.target == "__self__" else full_name(region, first.target)
    module = program.module(name)
    if module is not None and any(p is not None for p in module._parameters.values()):
        return name, f"{name} holds parameters of its own that may be per head"
    return name, None


def _per_head_inputs(node: fx.Node, heads: int) -> str | None:
    """Say which further input has one entry a head."""
    skip = 4 if getattr(node.target, "role", None) == "attention" else 3
    named = {k: v for k, v in node.kwargs.items() if k not in ("query", "key", "value")}
    further = [("its mask", a) for a in node.args[skip:]] + list(named.items())
    for name, argument in further:
        if not isinstance(argument, fx.Node):
            continue
        value = argument.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if not isinstance(value, Tensor) or (len(shape) > 2 and heads > 1 and shape[-3] == heads):
            return f"{name} may hold one entry a head"
    return None


def keep_heads(attention: Attention, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows of the query (and columns of the output), and of key and value, stay."""
    group = attention.query_heads // attention.value_heads
    value = (~dead).repeat_interleave(attention.width)
    query = (~dead).repeat_interleave(group * attention.width)
    return query, value


def constant_part(constants: Tensor, keep: Tensor) -> Tensor:
    """Return the constants of what goes, zero for what stays."""
    return torch.where(keep, torch.zeros_like(constants), constants)
