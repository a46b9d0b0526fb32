"""Replace the modules of sites by those that keep their storage, and show it in the graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, fx, nn

from mvpfx.facts import MODULES, NATIVE_DENSE
from mvpfx.layer import Layer, find_layers
from mvpfx.native_linear import NativeLinear
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program
from mvpfx.storage import Layout, SparseLinear, find_block


@dataclass(frozen=True)
class LowerMatmuls(Pass):
    """Build the modules that earlier passes decided on."""

    name: ClassVar[str] = "lower_matmuls"
    requires: ClassVar[tuple[str, ...]] = ("storages_chosen", "layouts_chosen")
    ensures: ClassVar[tuple[str, ...]] = ("lowered",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Build each module once; every matmul that used the weight becomes a call of it."""
        for layers in find_layers(program).values():
            for layer in layers.values():
                storage = program.storages.get(layer.weight_name)
                if storage not in MODULES:
                    continue
                module = program.module(layer.owner)
                if not isinstance(module, MODULES[storage]):
                    module = program.modules[layer.owner] = _build(program, layer, storage)
                    reason = _described(module)
                    yield Decision(layer.weight_name, f"lower to {storage}", True, reason)
                _rewrite(layer)


def _build(program: Program, layer: Layer, storage: str) -> SparseLinear | NativeLinear:
    weight, bias = layer.weight(program).contiguous(), layer.bias(program)
    if storage == NATIVE_DENSE:
        built = NativeLinear.of(weight, bias)
    else:
        built = _sparse(weight, bias, storage, program.layouts[layer.weight_name])
    original = program.module(layer.owner)
    assert original is not None
    trains = next(iter(original._parameters.values()))
    for parameter in built.parameters():
        parameter.requires_grad_(isinstance(trains, nn.Parameter) and trains.requires_grad)
    return built.train(original.training)


def _sparse(weight: Tensor, bias: Tensor | None, storage: str, layout: str) -> SparseLinear:
    return SparseLinear.from_dense(weight, bias, _block(weight, storage), cast("Layout", layout))


def _block(weight: Tensor, storage: str) -> int:
    """The block size that a weight is stored in.

    Native kernels leave zeros out whatever the block; it saves indices where blocks are full.
    """
    if storage == "bsr":
        return find_block(weight) or find_block(weight, waste=math.inf) or 1
    return (find_block(weight, waste=1.0) or 1) if storage == "native" else 1


def _described(module: SparseLinear | NativeLinear) -> str:
    size = module.in_features * module.out_features
    kept = f"{module.values.numel()} of " if isinstance(module, SparseLinear) else ""
    return f"{kept}{size} values, {module.storage_bytes} bytes, {module.output_layout} output"


def _rewrite(layer: Layer) -> None:
    """Turn the matmul into a call of the module that holds the weight."""
    node, graph = layer.node, layer.node.graph
    target = layer.owner.removeprefix(f"{layer.region}.") if layer.region else layer.owner
    with graph.inserting_before(node):
        call = graph.call_module(target, (layer.input,))
    call.meta = dict(node.meta)
    reads = [n for n in node.all_input_nodes if n is not layer.input]
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    for read in reads:
        _erase_unused(graph, read)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    while node.op != "placeholder" and not node.users:
        before = node.all_input_nodes
        graph.erase_node(node)
        if not before:
            return
        node = before[0]
