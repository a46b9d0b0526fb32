"""Nodes that mix elements along some dimensions, and keep the others apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, compact


@dataclass(frozen=True)
class Reduction:
    """Along `dims` everything depends on everything; the others are followed.

    Attributes:
        dims: those dimensions of the input, not negative.
        drops: whether the result lacks them.
        average: whether the result of equal elements is that element (mean, maximum, pooling).
        softmax: whether results sum to one along the only one of `dims`.
    """

    dims: tuple[int, ...]
    drops: bool = False
    average: bool = False
    softmax: bool = False

    def forward(self, step: Step) -> None:
        """An average of equal constants is that constant."""
        (out,), (x, *_) = step.outputs, step.inputs
        if self.softmax:
            out.sums_to_one = self.dims[0]
        if not self.average or x.known.is_nothing:
            return
        constant, value = x.known.constant, x.known.value.double()
        value = torch.where(constant, value, 0.0)
        for dim in self.dims:
            low, high = value.amin(dim, keepdim=True), value.amax(dim, keepdim=True)
            constant = constant.all(dim=dim, keepdim=True) & (low == high)
            value = low
        out.known = Known(compact(self._out(constant)), compact(self._out(value)))

    def backward(self, step: Step) -> None:
        """All along `dims` is needed where any result is."""
        (out,), (x, *others) = step.outputs, step.inputs
        needed = out.needed
        if self.drops:
            for dim in sorted(self.dims):
                needed = needed.unsqueeze(dim)
        else:
            for dim in self.dims:
                needed = needed.any(dim=dim, keepdim=True)
        x.need(needed)
        for other in others:
            other.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """The other dimensions lose the same indices, these none."""
        (out,), (x, *others) = step.outputs, step.inputs
        reason = f"{step.name} computes over them"
        mixed = (x,) if self.drops else (x, out)
        yield from stay(((value, dim) for dim in self.dims for value in mixed), reason)
        rest = [d for d in range(len(x.shape)) if d not in self.dims]
        for position, dim in enumerate(rest):
            yield from alike([(x, dim), (out, position if self.drops else dim)])
        yield from stay(all_dims(*others), reason)

    def _out(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(self.dims) if self.drops else tensor
