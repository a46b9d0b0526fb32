"""What a removal makes of a program: parameters, biases, graph literals, module attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from mvpfx.dims.channel_norm import ChannelSlope, GroupNorm
from mvpfx.dims.contraction import Fold
from mvpfx.dims.flow import Flow, folds_of
from mvpfx.dims.grouped_convolution import GroupedConvolution
from mvpfx.dims.literals import is_resized, new_arguments
from mvpfx.dims.projected_attention import ProjectedAttention
from mvpfx.dims.rule import Step, replaced
from mvpfx.dims.value import Value
from mvpfx.layer import resize
from mvpfx.program import Program, full_name, parent_name

_LAYERS = (
    nn.modules.conv._ConvNd, nn.GroupNorm, nn.PReLU,  # pyright: ignore[reportPrivateUsage]
    nn.modules.instancenorm._InstanceNorm,  # pyright: ignore[reportPrivateUsage]
)  # fmt: skip
"""Layers whose attributes are written by the rules of their nodes."""
UNWRITABLE = "the sizes in {} cannot be written for what would stay"


def make_writable(flow: Flow) -> dict[fx.Node, tuple[Any, ...]]:
    """Take back removals until every node can be written; new arguments of those that change."""
    while True:
        changed: dict[fx.Node, tuple[Any, ...]] = {}
        broken: Step | None = None
        for step, rule in flow.steps:
            arguments = new_arguments(step, rule)
            if arguments is None:
                broken = step
                break
            if arguments is not step.node.args:
                changed[step.node] = arguments
        if broken is None:
            return changed
        reason = UNWRITABLE.format(broken.name)
        if not flow.keep_one([*broken.inputs, *broken.outputs], reason):
            flow.block([broken], reason)


def rewrite(program: Program, flow: Flow, arguments: Mapping[fx.Node, tuple[Any, ...]]) -> None:
    """Write the removal into `program`: parameters and the graph of the region."""
    by_name = {node.name: node for node in program.graphs[flow.region].nodes}
    for step, fold in folds_of(flow):
        _fold(program, flow, step, by_name[step.node.name], fold)
    for name, value in flow.parameters.items():
        if value.kept_shape != value.shape:
            tensor = program.parameter(name)
            assert tensor is not None
            program.parameters[name] = value.keep(tensor.detach()).contiguous()
            _write_sizes(program, name, value)
    for node, new in arguments.items():
        target = by_name[node.name]
        target.args = replaced(new, lambda n: by_name[n.name])
    for step, rule in flow.steps:
        if isinstance(rule, ProjectedAttention) and is_resized(step):
            rule.write(program, by_name[step.node.name])
        if isinstance(rule, (GroupedConvolution, GroupNorm, ChannelSlope)) and is_resized(step):
            _write_attributes(program, flow, step, rule.module_sizes(step))
    for node, value in _single_values(flow):
        for dim, size in enumerate(value.kept_shape):
            if size != value.shape[dim]:
                resize(by_name[node.name], dim, size)


def _single_values(flow: Flow) -> Iterator[tuple[fx.Node, Value]]:
    for node, value in flow.values.items():
        if isinstance(value, Value):
            yield node, value


def _fold(program: Program, flow: Flow, step: Step, node: fx.Node, fold: Fold) -> None:
    """Add constants to a bias, before any of its entries go; make one where there is none."""
    added = fold.added
    if fold.bias is not None:
        name = full_name(flow.region, fold.bias.target)
        old = program.parameter(name)
        assert old is not None
        program.parameters[name] = (old.detach().double() + added.to(old.device)).to(old.dtype)
        return
    owner = full_name(flow.region, step.node.meta.get("module", ""))
    weight = program.parameter(full_name(owner, "weight"))
    assert weight is not None
    going = step.outputs[0].removed[step.features]
    made = added[~going].to(dtype=weight.dtype, device=weight.device)
    program.parameters[full_name(owner, "bias")] = made
    target = full_name(owner, "bias").removeprefix(f"{flow.region}." if flow.region else "")
    with node.graph.inserting_before(node):
        created = node.graph.get_attr(target)
    created.meta = {"module": node.meta.get("module", "")}
    node.args = (*node.args[:2], created, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}


def _write_attributes(program: Program, flow: Flow, step: Step, sizes: dict[str, int]) -> None:
    """Let the attributes of the layer that a step calls say what its rule says."""
    target = step.node.target if step.module is not None else step.node.meta.get("module", "")
    owner = full_name(flow.region, target)
    module = program.module(owner)
    if not isinstance(module, _LAYERS):
        return
    for attribute, size in sizes.items():
        if hasattr(module, attribute):
            program.attributes[owner, attribute] = size


def _write_sizes(program: Program, name: str, value: Value) -> None:
    """Let the attributes of a torch or transformers layer say the shape of its weight."""
    owner, leaf = parent_name(name), name.rpartition(".")[2]
    module = program.module(owner)
    for attribute, size in layer_sizes(module, leaf, value).items():
        if hasattr(module, attribute):
            program.attributes[owner, attribute] = size


def layer_sizes(module: nn.Module | None, leaf: str, value: Value) -> dict[str, int]:
    """What the attributes of a layer say of one of its parameters."""
    kept = value.kept_shape
    if isinstance(module, nn.modules.batchnorm._NormBase):  # pyright: ignore[reportPrivateUsage]
        return {"num_features": kept[0]}
    if leaf != "weight":
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": kept[0], "in_features": kept[1]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": kept[0], "embedding_dim": kept[1]}
    if isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        if module.groups > 1:
            return {}  # how many groups are left its rule says
        outputs, inputs = kept[:2] if not module.transposed else kept[1::-1]
        return {"out_channels": outputs, "in_channels": inputs}
    if hasattr(module, "nf") and len(kept) == 2:
        return {"nx": kept[0], "nf": kept[1]}
    return {}
