"""Decide in which layout each sparse layer hands on its output.

Sparse layers compute feature-major. Where everything that reads the result is elementwise or
another sparse layer, it stays so and no transpose is made; elsewhere it is made token-major, as
the rest of the model expects, at this edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mvpfx.dims.operations import find_operation
from mvpfx.facts import NATIVE
from mvpfx.layer import Layer, find_layers, is_conv1d_view
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name

FEATURE_MAJOR = ("csr", "bsr")
"""The storages that compute feature-major."""


@dataclass(frozen=True)
class PropagateLayout(Pass):
    """Set the output layout of every sparse site."""

    name: ClassVar[str] = "propagate_layout"
    requires: ClassVar[tuple[str, ...]] = ("storages_chosen",)
    ensures: ClassVar[tuple[str, ...]] = ("layouts_chosen",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Look forward from every use of a sparse site."""
        edges: dict[str, str | None] = {}
        for layers in find_layers(program).values():
            for layer in layers.values():
                name = layer.weight_name
                if program.storages.get(name) in FEATURE_MAJOR:
                    edge = _edge(program, layer, layers)
                    edges[name] = edges.get(name) or edge
        for name, storage in program.storages.items():
            if name in program.layouts:
                continue
            if storage in NATIVE:
                program.layouts[name] = "tiled"
                yield Decision(name, "output tiled", True, "native kernels compute in tiles")
            if storage not in FEATURE_MAJOR:
                continue
            edge = edges.get(name, "no graph shows who reads it")
            program.layouts[name] = "token_major" if edge else "feature_major"
            reason = edge or "read by elementwise operations and sparse layers only"
            yield Decision(name, f"output {program.layouts[name]}", True, reason)


def _edge(program: Program, layer: Layer, layers: Mapping[fx.Node, Layer]) -> str | None:
    """Return what needs the layer's output token-major; None where nothing does."""
    reached = {layer.node}
    stack = [layer.node]
    mixed: list[fx.Node] = []
    while stack:
        for user in stack.pop().users:
            reader = layers.get(user)
            if reader is not None:
                storage = program.storages.get(reader.weight_name)
                if storage not in FEATURE_MAJOR:
                    return f"read by {reader.weight_name}, which is {storage or 'dense'}"
                continue
            if not _is_free(program, layer, user, layers):
                name = getattr(user.target, "__name__", user.target)
                return f"read by {name if user.op != 'output' else 'the result of the region'}"
            if user not in reached:
                reached.add(user)
                stack.append(user)
                mixed.append(user)
    for node in mixed:
        for other in node.all_input_nodes:
            if other not in reached and not _is_fellow(program, other, layers):
                return f"{getattr(node.target, '__name__', node.target)} mixes it with other values"
    return None


def _is_free(
    program: Program, layer: Layer, node: fx.Node, layers: Mapping[fx.Node, Layer]
) -> bool:
    if is_conv1d_view(program, node, next_layer(node, layers) or layer, layers):
        return True
    called = None
    if node.op == "call_module":
        called = program.module(full_name(layer.region, node.target))
    return find_operation(node, called) is not None


def next_layer(node: fx.Node, layers: Mapping[fx.Node, Layer]) -> Layer | None:
    """Return the layer that reads `node` directly, if one does."""
    return next((layers[user] for user in node.users if user in layers), None)


def _is_fellow(program: Program, node: fx.Node, layers: Mapping[fx.Node, Layer]) -> bool:
    """Whether another operand keeps the layout: a parameter, a size, or a sparse layer's output."""
    if node.op == "get_attr" or node.target == "size":
        return True
    source = node
    while source not in layers and len(source.all_input_nodes) == 1:
        if find_operation(source, None) is None and source.op != "call_module":
            return False
        source = source.all_input_nodes[0]
    return source in layers and program.storages.get(layers[source].weight_name) in FEATURE_MAJOR
