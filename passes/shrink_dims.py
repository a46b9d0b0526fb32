"""Remove dead channels and dead attention heads, exactly.

A channel is dead where it is a constant (folded into the next bias), or where nothing reads it.
Both the row that makes it and the column that reads it go. One removal can cause the next, so the
rules run until none applies. A dimension never becomes empty: one channel or head stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mvpfx.channels import Chain, channel_facts, find_chain
from mvpfx.heads import Attention, constant_part, dead_heads, find_attentions, keep_heads
from mvpfx.layer import Layer, find_layers, find_obstacles, resize
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
VALUE_HEAD_COUNTS = ("num_key_value_heads",)
WIDTHS = ("all_head_size",)


@dataclass(frozen=True)
class ShrinkDims(Pass):
    """Remove channels between linear layers, and heads around attention.

    Args:
        channels: remove dead channels.
        heads: remove dead heads.
    """

    name: ClassVar[str] = "shrink_dims"
    requires: ClassVar[tuple[str, ...]] = ("masks_folded",)
    ensures: ClassVar[tuple[str, ...]] = ("masks_folded", "shapes_agree")
    channels: bool = True
    heads: bool = True

    def apply(self, program: Program) -> Iterator[Decision]:
        """Shrink until nothing is dead, then say what was left and why."""
        declined: dict[str, Decision] = {}
        changed = True
        while changed:
            declined.clear()
            changed = False
            obstacle = find_obstacles(program)
            for layers in find_layers(program).values():
                for decision in self._region(program, layers, obstacle):
                    if decision.applied:
                        changed = True
                        yield decision
                    else:
                        declined[decision.site] = decision
        yield from declined.values()

    def _region(
        self,
        program: Program,
        layers: Mapping[fx.Node, Layer],
        obstacle: Callable[[str], str | None],
    ) -> Iterator[Decision]:
        if self.channels:
            for consumer in layers.values():
                yield from _shrink_channels(program, consumer, layers, obstacle)
        if self.heads and layers:
            region = next(iter(layers.values())).region
            for node, found in find_attentions(program, region, layers):
                yield from _shrink_heads(program, region, node, found)


def _shrink_channels(
    program: Program,
    consumer: Layer,
    layers: Mapping[fx.Node, Layer],
    obstacle: Callable[[str], str | None],
) -> Iterator[Decision]:
    action = "remove dead channels"
    chain = find_chain(program, consumer, layers)
    if isinstance(chain, str):
        columns = int((~consumer.weight(program).any(dim=0)).sum())
        if columns:
            reason = f"{columns} input columns are zero, but {chain}"
            yield Decision(consumer.weight_name, action, False, reason)
        return
    facts = channel_facts(program, chain)
    unread = ~consumer.weight(program).any(dim=0)
    if len(unread) != len(facts.constant):
        return
    nonzero = facts.constant & (facts.value != 0) & ~unread
    foldable = facts.constant if consumer.can_add_bias(program) else facts.constant & ~nonzero
    keep = ~(unread | foldable)
    if not bool(keep.any()):
        keep[0] = True
    if bool(keep.all()):
        if bool((nonzero & ~foldable).any()):
            count = int((nonzero & ~foldable).sum())
            reason = (
                f"{count} channels are constant but not zero, and there is no bias to take them"
            )
            yield Decision(consumer.weight_name, action, False, reason)
        return
    reason = _obstacle_of(chain, obstacle)
    if reason is not None:
        reason = f"{int((~keep).sum())} of {len(keep)} channels are dead, but {reason}"
        yield Decision(consumer.weight_name, action, False, reason)
        return
    folded = constant_part(torch.where(facts.constant & ~unread, facts.value, 0.0), keep)
    _remove_channels(program, chain, keep, folded)
    where = " and ".join(p.weight_name for p in chain.producers)
    reason = f"{len(keep)} -> {int(keep.sum())} channels from {where}"
    if bool(folded.any()):
        reason += f", {int((folded != 0).sum())} constants folded into the bias"
    yield Decision(consumer.weight_name, action, True, reason)


def _obstacle_of(chain: Chain, obstacle: Callable[[str], str | None]) -> str | None:
    for layer in (chain.consumer, *chain.producers):
        if layer.obstacle is not None:
            return layer.obstacle
    return next(filter(None, map(obstacle, chain.vectors)), None)


def _remove_channels(program: Program, chain: Chain, keep: Tensor, folded: Tensor) -> None:
    size = int(keep.sum())
    _fold(program, chain.consumer, folded)
    chain.consumer.keep_columns(program, keep)
    for producer in chain.producers:
        producer.keep_rows(program, keep)
        resize(producer.node, -1, size)
    for name in chain.vectors:
        value = program.parameter(name)
        assert value is not None
        program.parameters[name] = value.detach()[keep]
    for node in chain.nodes:
        resize(node, -1, size)
    for node in chain.views:
        _rewrite_last_size(node, len(keep), size)


def _fold(program: Program, layer: Layer, constants: Tensor) -> None:
    """Fold constant inputs into the layer's bias; give its node one where it had none."""
    layer.fold(program, constants)
    name = full_name(layer.owner, "bias")
    graph, node = layer.node.graph, layer.node
    has_bias = layer.bias_name is not None or (len(node.args) > 2 and node.args[2] is not None)
    if not has_bias and name in program.parameters:
        target = name.removeprefix(f"{layer.region}.") if layer.region else name
        with graph.inserting_before(node):
            bias = graph.get_attr(target)
        bias.meta = {"module": node.meta.get("module", "")}
        node.args = (*node.args[:2], bias)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}


def _rewrite_last_size(node: fx.Node, old: int, new: int) -> None:
    """Let a view inside HF Conv1D say the new channel count, as its forward will."""
    *front, last = node.args
    if isinstance(last, (tuple, list)):
        sizes = tuple(last)
        node.args = (*front, (*sizes[:-1], new if sizes[-1] == old else sizes[-1]))
    elif last == old:
        node.args = (*front, new)


def _shrink_heads(
    program: Program, region: str, node: fx.Node, found: Attention | str
) -> Iterator[Decision]:
    action = "remove dead heads"
    if isinstance(found, str):
        site = full_name(region, node.meta.get("module", "") or node.name)
        yield Decision(site, action, False, found)
        return
    dead, constants = dead_heads(program, found)
    if not bool(dead.any()):
        return
    if bool(dead.all()):
        dead[0] = False
    site = found.output.weight_name
    if not bool(dead.any()):
        return
    reason = next((layer.obstacle for layer in found.layers if layer.obstacle), None)
    keep_query, keep_value = keep_heads(found, dead)
    folded = constant_part(constants, keep_query)
    read = found.output.weight(program)[:, folded != 0]
    if reason is None and bool(read.any()) and not found.output.can_add_bias(program):
        reason = "a dead head is constant but not zero, and there is no bias to take it"
    if reason is not None:
        yield Decision(site, action, False, f"{int(dead.sum())} heads are dead, but {reason}")
        return
    _fold(program, found.output, folded)
    found.output.keep_columns(program, keep_query)
    for layer, keep in zip(found.layers, (keep_query, keep_value, keep_value), strict=False):
        layer.keep_rows(program, keep)
    groups = int((~dead).sum())
    heads = groups * found.query_heads // found.value_heads
    _update_sizes(program, found, heads, groups)
    reason = f"{found.query_heads} -> {heads} heads"
    if bool(folded.any()):
        reason += ", constant values folded into the bias"
    if any(u.args[1:] == (1,) and u.users for u in node.users):
        reason += "; returned attention probabilities lose these heads too"
    yield Decision(site, action, True, reason)


def _update_sizes(program: Program, attention: Attention, heads: int, groups: int) -> None:
    """Make attributes and metadata say the new head counts."""
    old = dict.fromkeys(HEAD_COUNTS, (attention.query_heads, heads))
    old |= dict.fromkeys(VALUE_HEAD_COUNTS, (attention.value_heads, groups))
    width = attention.width
    old |= dict.fromkeys(WIDTHS, (attention.query_heads * width, heads * width))
    for name, (before, after) in old.items():
        if program.attribute(attention.module_name, name) == before:
            program.attributes[attention.module_name, name] = after
    for layer, count in zip(attention.layers, (heads, groups, groups), strict=False):
        resize(layer.node, -1, count * width)
    for node in (attention.node, *attention.inner):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if dim == value.dim() - 1 and size == attention.query_heads * width:
                resize(node, dim, heads * width)
        if value.dim() == 4:
            _resize_heads(node, attention, heads, groups)


def _resize_heads(node: fx.Node, attention: Attention, heads: int, groups: int) -> None:
    """The head dimension of a 4-D value: where its size is the old head count."""
    value: Tensor = node.meta["val"]
    for dim in (1, 2):
        size = value.shape[dim]
        if size in (attention.query_heads, attention.value_heads):
            resize(node, dim, heads if size == attention.query_heads else groups)
            return
