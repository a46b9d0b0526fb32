"""Nodes that act on each slice by itself: they mix along some dimensions, not along others.

Interpolation, padding, pooling and reductions mix elements of one channel, and never two channels.
Others take channels in blocks, as `unfold` does, which makes `k * k` channels of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, compact

Keeps = Literal["same", "zero", "flat", "nothing"]
"""What becomes of a slice that is one constant: the same constant; zero where it was zero; zero
whatever it was; nothing that is known. Sizes of slices vary from call to call, so nothing that
depends on them is known."""


@dataclass(frozen=True)
class Slicewise:
    """Each slice of the results depends on one slice of the first input, and on all of the others.

    Attributes:
        mixed: the dimensions of the first input that are mixed, not negative.
        free: (dimension of the first input, dimension of the results) of all others.
        keeps: what becomes of constants; of the first result only.
        block: along dimension 1, how many channels of the input make how many of the results.
    """

    mixed: tuple[int, ...]
    free: tuple[tuple[int, int], ...]
    keeps: Keeps = "nothing"
    block: tuple[int, int] = (1, 1)

    def forward(self, step: Step) -> None:
        """Constant where a slice is one constant that the node keeps."""
        x, out = step.inputs[0], step.outputs[0]
        if self.keeps == "nothing" or x.known.is_nothing:
            return
        constant, value = self._uniform(x)
        if self.keeps == "zero":
            constant = constant & (value == 0)
        value = torch.zeros_like(value) if self.keeps == "flat" else value
        constant, value = self._over(constant, out), self._over(value, out)
        out.known = Known(compact(constant), compact(torch.where(constant, value, 0.0)))

    def backward(self, step: Step) -> None:
        """A slice is needed where anything computed from it is."""
        x, *others = step.inputs
        for out in step.outputs:
            x.need(self._back(out.needed, x))
        for other in others:
            other.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """What is not mixed loses the same indices, the rest none."""
        x, *others = step.inputs
        reason = f"{step.name} computes over them"
        yield from stay(((x, dim) for dim in self.mixed), reason)
        made = {own for _, own in self.free}
        for out in step.outputs:
            rest = (d for d in range(len(out.shape)) if d not in made)
            yield from stay(((out, dim) for dim in rest), reason)
        yield from stay(all_dims(*others), reason)
        for dim, own in self.free:
            yield from self._kept_constant(step, x, dim, own)
            if dim == 1 and self.block != (1, 1):
                yield from in_blocks([(x, 1, self.block[0])], self._results(step), step.name)
            else:
                yield from alike([(x, dim), *((out, own) for out in step.outputs)])

    def _results(self, step: Step) -> list[tuple[Value, int, int]]:
        own = dict(self.free)[1]
        return [(out, own, self.block[1]) for out in step.outputs]

    def _kept_constant(self, step: Step, x: Value, dim: int, own: int) -> Iterator[Value]:
        """Say of what was constant before a node and is not after it, that this is why it stays."""
        if dim != 1 or self.block != (1, 1) or x.known.is_nothing:
            return
        size = x.shape[1]
        lost = x.known.constant.expand(x.shape).transpose(0, 1).reshape(size, -1).all(dim=1)
        for out in step.outputs:
            missing = lost & x.removed[1] & ~out.removed[own]
            silent = out.reasons[own] is None and out.fixed[own] is None
            if bool(missing.any()) and silent:
                reason = f"they are constant, and not after {step.name}"
                if x.allow(1, out.removed[own], reason):
                    yield x

    def _uniform(self, x: Value) -> tuple[Tensor, Tensor]:
        """Where slices are one constant, and which; size 1 along what is mixed."""
        constant = x.known.constant
        value = torch.where(constant, x.known.value.double(), 0.0)
        constant = constant.expand(value.shape)
        for dim in self.mixed:
            low, high = value.amin(dim, keepdim=True), value.amax(dim, keepdim=True)
            constant = constant.all(dim=dim, keepdim=True) & (low == high)
            value = low
        if self.block[0] > 1 and value.shape[1] > 1:
            parts = value.unflatten(1, (-1, self.block[0]))
            low, high = parts.amin(dim=2), parts.amax(dim=2)
            constant = constant.unflatten(1, (-1, self.block[0])).all(dim=2) & (low == high)
            value = low
        if self.block[1] > 1 and value.shape[1] > 1:
            constant, value = (t.repeat_interleave(self.block[1], 1) for t in (constant, value))
        return constant, value

    def _over(self, tensor: Tensor, out: Value) -> Tensor:
        """A tensor like the input, with size 1 along what is mixed, as one like a result."""
        kept = [dim for dim, _ in self.free]
        if self.mixed:
            tensor = tensor.squeeze(self.mixed)
        tensor = tensor.permute([kept.index(dim) for dim, _ in self._ordered()])
        made = {own for _, own in self.free}
        for dim in range(len(out.shape)):
            if dim not in made:
                tensor = tensor.unsqueeze(dim)
        return tensor

    def _back(self, needed: Tensor, x: Value) -> Tensor:
        """What is needed of a result, as what is needed of the input."""
        made = {own for _, own in self.free}
        others = tuple(d for d in range(needed.dim()) if d not in made)
        if others:
            needed = needed.any(dim=others)
        order = [dim for dim, _ in self._ordered()]
        needed = needed.permute([order.index(dim) for dim in sorted(order)])
        for dim in sorted(self.mixed):
            needed = needed.unsqueeze(dim)
        if self.block != (1, 1) and needed.shape[1] > 1:
            whole = needed.unflatten(1, (-1, self.block[1])).any(dim=2)
            needed = whole.repeat_interleave(self.block[0], 1)
        return needed

    def _ordered(self) -> list[tuple[int, int]]:
        """The free dimensions in the order of the results."""
        return sorted(self.free, key=lambda pair: pair[1])


class Softmax(Slicewise):
    """A softmax along the only mixed dimension."""

    def forward(self, step: Step) -> None:
        """Results sum to one."""
        step.outputs[0].sums_to_one = self.mixed[0]


def in_blocks(
    sources: list[tuple[Value, int, int]], results: list[tuple[Value, int, int]], name: str
) -> Iterator[Value]:
    """Let blocks of neighbours go together, everywhere or nowhere; yields what changed.

    Args:
        sources: (value, dimension, indices in one block).
        results: likewise.
        name: of what takes blocks, for the reason.
    """
    places = [*sources, *results]
    whole = [v.removed[dim].unflatten(0, (-1, size)).all(dim=1) for v, dim, size in places]
    common = torch.stack(whole).all(dim=0)
    for value, dim, size in places:
        why = next((v.fixed[d] or v.reasons[d] for v, d, _ in places if v is not value), None)
        reason = why or f"{name} takes {max(s for _, _, s in places)} of them at a time"
        if value.allow(dim, common.repeat_interleave(size), reason):
            yield value
