"""Convolutions: linear over channels, with places that see padding.

Shapes: input `[B, C, ...]`, weight `[O, C / groups, ...]`, output `[B, O, ...]`; transposed ones
have weights `[C, O, ...]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.dims.contraction import Fold, uniform_constants
from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, any_slice, shrink_to


@dataclass(frozen=True)
class Convolution:
    """A convolution with one group.

    Attributes:
        transposed: whether the weight is `[C, O, ...]`.
        padded: whether some places see zeros, so that only zeros may be folded.
        has_bias: whether there is a bias that constants can be folded into.
    """

    transposed: bool
    padded: bool
    has_bias: bool

    def forward(self, step: Step) -> None:
        """An output channel is constant where all channels that its weight reads are."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        constant, value = self._foldable(x)
        read = self._read(weight)
        summed = self._summed(weight)
        found = ~(read & ~constant).any(dim=1)
        total = summed @ torch.where(constant, value, 0.0)
        if bias is not None:
            total = total + bias.known.value.double()
        if bool(found.any()):
            shape = [1, -1] + [1] * (len(out.shape) - 2)
            out.known = Known(found.view(shape), torch.where(found, total, 0.0).view(shape))

    def backward(self, step: Step) -> None:
        """A channel is needed where an output that reads it is."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        needed = any_slice(out.needed, 1, out.shape[1])
        shape = [1, -1] + [1] * (len(x.shape) - 2)
        x.need(self._unfolded(weight, needed).view(shape))
        weight.need(torch.ones((), dtype=torch.bool))
        if bias is not None:
            bias.need(shrink_to(needed, bias.shape))

    def agree(self, step: Step) -> Iterator[Value]:
        """Outputs go with rows of the weight, inputs with columns that add nothing."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        rows, columns = (1, 0) if self.transposed else (0, 1)
        slid = ((v, dim) for v, dim in all_dims(x, out, weight) if dim >= 2)
        yield from stay(slid, f"{step.name} slides over them")
        yield from alike([(x, 0), (out, 0)])
        outputs = [(out, 1), (weight, rows), *([(bias, 0)] if bias is not None else [])]
        yield from alike(outputs)
        needed = any_slice(out.needed, 1, out.shape[1])
        constant, value = self._foldable(x)
        unread = ~self._unfolded(weight, needed)
        allowed = unread | (constant & ((value == 0) | self.has_bias))
        if x.allow(1, allowed, self._reason(x, allowed)):
            yield x
        yield from alike([(x, 1), (weight, columns)])

    @property
    def weight_dims(self) -> tuple[int, int]:
        """The dimensions of the weight that hold output and input channels."""
        return (1, 0) if self.transposed else (0, 1)

    @property
    def input_dim(self) -> int:
        """The dimension of input channels."""
        return 1

    def folds(self, step: Step) -> Iterator[Fold]:
        """What constants that go add to the bias."""
        x, weight, _ = self.parts(step)
        constant, value = self._foldable(x)
        taken = torch.where(x.removed[1] & constant, value, 0.0)
        if bool(taken.any()):
            yield Fold(weight, step.bias, self._summed(weight) @ taken, int((taken != 0).sum()))

    def parts(self, step: Step) -> tuple[Value, Value, Value | None]:
        """Input, weight and bias."""
        x, weight, *bias = step.values.values()
        return x, weight, bias[0] if bias else None

    def _reason(self, x: Value, allowed: Tensor) -> str:
        """Why input channels stay that would go if it were for their producer."""
        constant, value = uniform_constants(x, 1)
        if not bool((constant & (value != 0) & ~allowed & x.removed[1]).any()):
            return "they are needed"
        why = "padding puts zeros beside them" if self.padded else "no bias can take them"
        return f"they are constant, not zero, and {why}"

    def _foldable(self, x: Value) -> tuple[Tensor, Tensor]:
        constant, value = uniform_constants(x, 1)
        return (constant & (value == 0), value) if self.padded else (constant, value)

    def _weight(self, weight: Value) -> Tensor:
        return weight.known.value.transpose(0, 1) if self.transposed else weight.known.value

    def _read(self, weight: Value) -> Tensor:
        return (self._weight(weight) != 0).flatten(2).any(dim=2)

    def _summed(self, weight: Value) -> Tensor:
        return self._weight(weight).double().flatten(2).sum(dim=2)

    def _unfolded(self, weight: Value, needed: Tensor) -> Tensor:
        return (self._read(weight) & needed[:, None]).any(dim=0)


@dataclass(frozen=True)
class Lookup:
    """An embedding: rows are chosen by numbers, columns are channels of the result."""

    def forward(self, step: Step) -> None:
        """A column that is the same in all rows is constant."""
        (out,) = step.outputs
        table = self._table(step)
        if not table.known.is_all:
            return
        constant, value = uniform_constants(table, 1)
        if bool(constant.any()):
            shape = [1] * (len(out.shape) - 1) + [-1]
            out.known = Known(constant.view(shape), value.view(shape))

    def backward(self, step: Step) -> None:
        """The numbers are needed; the table follows."""
        for value in step.inputs:
            value.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """Columns go with channels; rows stay."""
        (out,) = step.outputs
        table = self._table(step)
        columns = [(table, 1), (out, len(out.shape) - 1)]
        yield from alike(columns)
        rest = (place for place in all_dims(*step.inputs, out) if place not in columns)
        yield from stay(rest, "rows are chosen by the input")

    def _table(self, step: Step) -> Value:
        if "weight" in step.extra:
            return step.extra["weight"]
        return next(v for v in step.inputs if v.known.is_all and len(v.shape) == 2)
