"""Products of two tensors, summed over a dimension: linear layers, matmul, einsum.

Each dimension has a letter, as in einsum: `abk,nk->abn` is a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mvpfx.dims.rule import Step, alike
from mvpfx.dims.value import Known, Value, any_slice, compact, shrink_to, slices


@dataclass(frozen=True, eq=False)
class Fold:
    """Constants that go, and are added to a bias.

    Attributes:
        weight: that they were multiplied by.
        bias: the node that reads the bias; None where one is to be made.
        added: what is added, float64 `[N]`.
        count: how many constants that was.
    """

    weight: Value
    bias: fx.Node | None
    added: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class Contraction:
    """`out = x y (+ bias)`.

    Attributes:
        x, y, out: letters of the dimensions.
        operands: positions of x, y and the bias among the step's inputs (bias may be None).
        can_fold: whether a constant can be added to the bias, or a bias be created.
    """

    x: str
    y: str
    out: str
    operands: tuple[int, int, int | None]
    can_fold: bool = False

    def forward(self, step: Step) -> None:
        """Constant where every product that is summed is: both factors known, or one zero."""
        x, y, bias = self.parts(step)
        (out,) = step.outputs
        kx, ky = x.known, y.known
        unknown = self._product(_f(~kx.constant), _f(~ky.zero))
        unknown = unknown + self._product(_f(~kx.zero), _f(~ky.constant))
        constant = unknown == 0
        value = self._sum(x, y)
        if self._summed_varies(x, y):
            constant = constant & (value == 0)  # another sum in another call
        if self._averages(x) and bool(ky.constant.any()):
            uniform, average = self._uniform(y)
            constant, value = constant | uniform, torch.where(constant, value, average)
        if bias is not None:
            constant = constant & bias.known.constant
            value = value + bias.known.value
        if bool(constant.any()):
            value = torch.where(constant, value, 0.0)
            out.known = Known(compact(constant), compact(value))

    def backward(self, step: Step) -> None:
        """A factor is needed where a result is and the other factor is not zero."""
        x, y, bias = self.parts(step)
        (out,) = step.outputs
        needed = moving = out.needed
        if self._averages(x):
            uniform, _ = self._uniform(y)
            moving = needed & ~uniform
        x.need(self._needed(moving, self.x, self.y, y, x))
        if not y.known.is_all:  # what is constant is dead, needed or not
            y.need(self._needed(needed, self.y, self.x, x, y))
        if bias is not None:
            bias.need(shrink_to(needed, bias.shape))

    def agree(self, step: Step) -> Iterator[Value]:
        """Letters lose the same indices everywhere; summed ones only what adds nothing."""
        x, y, bias = self.parts(step)
        (out,) = step.outputs
        for letter in self.x + "".join(c for c in self.y if c not in self.x):
            places = [
                (value, word.index(letter))
                for value, word in ((x, self.x), (y, self.y), (out, self.out))
                if letter in word and (value.shape[word.index(letter)] > 1 or letter in self.summed)
            ]
            if letter in self.summed:
                yield from self._absorb(letter, x, y, out)
            if bias is not None and letter in self.out:
                dim = self.out.index(letter) - len(self.out) + len(bias.shape)
                if dim >= 0 and bias.shape[dim] > 1:
                    places.append((bias, dim))
            if len(places) > 1:
                yield from alike(places)

    def parts(self, step: Step) -> tuple[Value, Value, Value | None]:
        """x, y and the bias."""
        x, y, bias = self.operands
        given = list(step.values.values())
        return given[x], given[y], given[bias] if bias is not None else None

    @property
    def summed(self) -> str:
        """The letters that are summed."""
        return "".join(c for c in self.x if c in self.y and c not in self.out)

    @property
    def weight_dims(self) -> tuple[int, int]:
        """The dimensions of y that hold output and input features."""
        columns = self.y.index(self.summed[0])
        return next(d for d in reversed(range(len(self.y))) if d != columns), columns

    @property
    def input_dim(self) -> int:
        """The dimension of x that is summed."""
        return self.x.index(self.summed[0])

    def folds(self, step: Step) -> Iterator[Fold]:
        """What constants that go add to the bias."""
        x, y, _ = self.parts(step)
        if not self._folds_into(y):
            return
        letter, dim = self.summed, self.input_dim
        constant, value = uniform_constants(x, dim)
        taken = torch.where(x.removed[dim] & constant, value, 0.0)
        if not bool(taken.any()):
            return
        weight = y.known.value.double()
        added = weight @ taken if self.y.index(letter) == 1 else taken @ weight
        yield Fold(y, step.bias, added, int((taken != 0).sum()))

    def _folds_into(self, y: Value) -> bool:
        """Whether constants of x can be multiplied by `y` once and for all, and added to a bias."""
        return self.can_fold and len(y.shape) == 2 and y.known.is_all

    def _absorb(self, letter: str, x: Value, y: Value, out: Value) -> Iterator[Value]:
        """Take back what would be missing in a sum that is needed."""
        dim, other = self.x.index(letter), self.y.index(letter)
        size = x.shape[dim]
        needed = self._needed(out.needed, self.x, self.y, y, x)
        unread = ~any_slice(needed, dim, size)
        zero = slices(x.known.zero, dim, size) | slices(y.known.zero, other, y.shape[other])
        allowed = unread | zero
        constant, _ = uniform_constants(x, dim)
        reason = "they are needed"
        if self._folds_into(y):
            allowed = allowed | constant
        elif bool((constant & ~allowed & x.removed[dim]).any()):
            reason = "they are constant, not zero, and no bias can take them"
        for value, place in ((x, dim), (y, other)):
            if value.allow(place, allowed, reason):
                yield value

    def _needed(self, needed: Tensor, own: str, others: str, other: Value, value: Value) -> Tensor:
        nonzero = ~other.known.zero
        if not bool(needed.any()):
            return torch.zeros((1,) * len(value.shape), dtype=torch.bool)
        counted = torch.einsum(f"{self.out},{others}->{own}", _f(needed), _f(nonzero))
        return shrink_to(counted > 0, value.shape)

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum(f"{self.x},{self.y}->{self.out}", x, y)

    def _sum(self, x: Value, y: Value) -> Tensor:
        """The sum of the constant products, in float64."""
        left = torch.where(x.known.constant, x.known.value, 0.0).double()
        right = (
            y.known.value if y.known.is_all else torch.where(y.known.constant, y.known.value, 0.0)
        )
        if not bool(left.any()) or not bool(right.any()):
            return torch.zeros((1,) * len(self.out), dtype=torch.float64)
        for letter in self.summed:
            dim = self.x.index(letter)
            sizes = list(left.shape)
            sizes[dim] = x.shape[dim]
            left = left.expand(sizes)
        return self._product(left, right.double())

    def _summed_varies(self, x: Value, y: Value) -> bool:
        """Whether how many products are summed depends on the call."""
        words = ((x, self.x), (y, self.y))
        return any(v.varies and v.varies[w.index(c)] for v, w in words for c in self.summed)

    def _averages(self, x: Value) -> bool:
        return x.sums_to_one is not None and self.summed == self.x[x.sums_to_one]

    def _uniform(self, y: Value) -> tuple[Tensor, Tensor]:
        """Where an average over the summed letter is constant, and what it is, like the output."""
        dim = self.y.index(self.summed)
        constant, value = along(y, dim)
        ones = torch.ones((1,) * len(self.x), dtype=torch.float64)
        found = self._product(ones, constant.double()) > 0
        return found, self._product(ones, torch.where(constant, value, 0.0))


def along(value: Value, dim: int) -> tuple[Tensor, Tensor]:
    """Where a value is one constant along `dim`, and which; size 1 along it."""
    constant = value.known.constant.all(dim=dim, keepdim=True)
    whole = value.known.value.double()
    first = whole.narrow(dim, 0, 1)
    same = (whole == first).all(dim=dim, keepdim=True)
    constant = constant & same
    return constant, torch.where(constant, first, 0.0)


def uniform_constants(value: Value, dim: int) -> tuple[Tensor, Tensor]:
    """For each index along `dim`: whether its slice is one constant, and which (float64)."""
    size, known = value.shape[dim], value.known
    constant = slices(known.constant, dim, size)
    whole = torch.where(known.constant, known.value, 0.0).double()
    others = [d for d in range(whole.dim()) if d != dim]
    low = whole.amin(dim=others) if others else whole
    high = whole.amax(dim=others) if others else whole
    same = (low == high).expand(size)
    return constant & same, torch.where(constant & same, low.expand(size), 0.0)


def _f(mask: Tensor) -> Tensor:
    return mask.to(torch.float32)
