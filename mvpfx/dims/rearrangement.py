"""Nodes that only move elements: views, transpositions, splits, concatenations.

They are run on the numbers of the elements instead of on the elements, which says where each one
goes, for any such node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.dims.rule import Step, alike, replaced
from mvpfx.dims.value import Known, Value, compact, slices

NAMES = frozenset((
    "__getitem__", "broadcast_to", "cat", "channel_shuffle", "chunk", "clone", "concat",
    "concatenate", "contiguous", "detach", "expand", "expand_as", "flatten", "flip", "getitem",
    "hstack", "index_select", "movedim", "mT", "narrow", "permute", "pixel_shuffle",
    "pixel_unshuffle", "repeat", "repeat_interleave", "reshape", "reshape_as", "roll", "select",
    "split", "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t", "T",
    "tensor_split", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
    "vstack",
))  # fmt: skip
CHOOSING = frozenset((
    "__getitem__", "getitem", "index_select", "narrow", "select", "split", "split_with_sizes",
))  # fmt: skip
"""Those that may leave elements out."""
EXPANSIONS = ("broadcast_to", "expand", "expand_as")
SHAPED = frozenset(("expand_as", "reshape_as", "view_as"))
"""Those that take of their second tensor its sizes alone."""
SKIPPING = CHOOSING | SHAPED | {"repeat_interleave"}
"""Those that may, and those that read of an input its sizes or no elements at all."""


class Rearrangement:
    """Each output element is one input element."""

    def forward(self, step: Step) -> None:
        """Constants move with their elements."""
        if all(value.known.is_nothing for value in step.inputs):
            return
        constant = [_flat(v.known.constant, v.shape) for v in step.inputs]
        value = [_flat(_real(v.known.value), v.shape) for v in step.inputs]
        flat_constant, flat_value = torch.cat(constant), torch.cat(value)
        for output, places in zip(step.outputs, sources(step), strict=True):
            found = flat_value[places]
            kept = flat_constant[places]
            output.known = Known(compact(kept), compact(torch.where(kept, found, 0.0)))

    def backward(self, step: Step) -> None:
        """An element is needed where one of its copies is."""
        if step.name not in SKIPPING and all(bool(v.needed.all()) for v in step.outputs):
            for value in step.inputs:  # each has a copy
                value.need(torch.ones((1,) * len(value.shape), dtype=torch.bool))
            return
        whole = sum(torch.Size(value.shape).numel() for value in step.inputs)
        needed = torch.zeros(whole, dtype=torch.bool)
        for output, places in zip(step.outputs, sources(step), strict=True):
            if bool(output.needed.any()):
                needed[places[output.needed.expand(output.shape)]] = True
        offset = 0
        for value in step.inputs:
            count = torch.Size(value.shape).numel()
            value.need(needed[offset : offset + count].view(value.shape))
            offset += count

    def agree(self, step: Step) -> Iterator[Value]:
        """An element goes with all of its copies, and a slice with all of its elements."""
        if not any(bool(r.any()) for v in (*step.inputs, *step.outputs) for r in v.removed):
            return
        if step.name in SHAPED and len(step.inputs) == 2:
            for dim in range(len(step.outputs[0].shape)):
                yield from alike([(step.outputs[0], dim), (step.inputs[1], dim)])
        found = sources(step)
        gone = torch.cat([_flat(v.elements(), v.shape) for v in step.inputs])
        stay = torch.zeros_like(gone)
        read = torch.zeros_like(gone)
        for output, places in zip(step.outputs, found, strict=True):
            both = output.elements().expand(output.shape) & gone[places]
            dims = dict.fromkeys(range(len(output.shape)), both)
            yield from _fit(output, dims, self._why(step))
            both = output.elements().expand(output.shape)
            stay[places[~both]] = True
            read[places] = True
        chosen = _chosen_by_number(step)
        offset = 0
        for value in step.inputs:
            part = slice(offset, offset + torch.Size(value.shape).numel())
            left = (gone & ~stay)[part].view(value.shape)
            kept = left & read[part].view(value.shape)
            dims = {d: kept if d in chosen else left for d in range(len(value.shape))}
            yield from _fit(value, dims, self._why(step))
            offset = part.stop

    def _why(self, step: Step) -> str:
        for value in (*step.inputs, *step.outputs):
            found = next((r for r in value.reasons if r is not None), None)
            if found is not None:
                return found
        return f"{step.name} shares a dimension with elements that are needed"


def sources(step: Step) -> list[Tensor]:
    """For each output: the number of the input element behind each of its elements.

    Input elements are numbered through, one input after the other.
    """
    numbers: dict[fx.Node, Tensor] = {}
    offset = 0
    for node, value in step.values.items():
        count = torch.Size(value.shape).numel()
        numbers[node] = torch.arange(offset, offset + count).view(value.shape)
        offset += count
    return run(step, numbers, step.node.args)


def run(step: Step, tensors: dict[fx.Node, Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    """Run a step's node on other tensors and positional arguments; its results in order."""
    known: dict[fx.Node, Any] = {**step.numbers, **tensors}
    args: Any = replaced(arguments, known.__getitem__)
    kwargs: Any = replaced(step.node.kwargs, known.__getitem__)
    if step.node.op == "call_method":
        name = "reshape" if step.node.target == "view" else str(step.node.target)
        out: Any = getattr(args[0], name)(*args[1:], **kwargs)
    else:
        target: Any = step.node.target if step.module is None else step.module
        out = target(*args, **kwargs)
    return [out] if isinstance(out, Tensor) else list(out)


class Expansion(Rearrangement):
    """A node that repeats a tensor along dimensions: there it may have any size."""

    def agree(self, step: Step) -> Iterator[Value]:
        """Dimensions that are not repeated lose the same indices."""
        (out,), (x, *others) = step.outputs, step.inputs
        for dim, size in enumerate(out.shape):
            own = dim - len(out.shape) + len(x.shape)
            places = [(out, dim), *((other, dim) for other in others)]
            if own >= 0 and x.shape[own] == size:
                places.append((x, own))
            yield from alike(places)


def _chosen_by_number(step: Step) -> set[int]:
    """The dimensions along which the sizes of a call say which elements are left out."""
    if not step.numbers or step.name not in CHOOSING:
        return set()
    rank = len(step.inputs[0].shape)
    if step.name not in ("getitem", "__getitem__"):
        dim = step.argument(2 if step.name.startswith("split") else 1, "dim", 0)
        return {dim % rank} if isinstance(dim, int) else set(range(rank))
    index: Any = step.node.args[1]
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for item in items if item is not None and item is not ...)
    found: set[int] = set()
    dim = 0
    for item in items:
        parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
        if any(isinstance(part, fx.Node) for part in parts):
            found.add(dim)
        dim += 0 if item is None else rank - taken if item is ... else 1
    return found


def _fit(value: Value, gone: dict[int, Tensor], reason: str) -> Iterator[Value]:
    """Keep the removals of `value` whose whole slice is in `gone`, by dimension."""
    for dim, size in enumerate(value.shape):
        if not bool(value.removed[dim].any()):
            continue
        if value.allow(dim, slices(gone[dim], dim, size), reason):
            yield value


def _real(value: Tensor) -> Tensor:
    """Numbers in float64; nothing is known of complex ones."""
    return torch.zeros_like(value, dtype=torch.float64) if value.is_complex() else value.double()


def _flat(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    return mask.expand(shape).reshape(-1)
