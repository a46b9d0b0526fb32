"""Elementwise nodes: constants are mapped, a known zero factor makes the other one unneeded."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvpfx.dims.operations import Operation, evaluate
from mvpfx.dims.rule import Step, alike
from mvpfx.dims.value import Known, Value, compact, shrink_to


class Elementwise:
    """Each output element depends on the input elements at the same place, with broadcasting."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def forward(self, step: Step) -> None:
        """Constant where all operands are, or where a factor is zero."""
        (out,) = step.outputs
        operands = self._operands(step)
        constant = torch.ones((1,) * len(out.shape), dtype=torch.bool)
        for operand in operands:
            if isinstance(operand, Value):
                constant = constant & operand.known.constant
        zero = self._zero(operands)
        if bool((constant | zero).any()):
            values = [_double(o.known.value) if isinstance(o, Value) else o for o in operands]
            result = torch.as_tensor(evaluate(self.operation, step.node, values))
            result = result.double() if result.is_floating_point() else result
            constant = constant & result.isfinite()
            value = torch.where(zero, 0.0, torch.where(constant, result, 0.0))
            out.known = Known(compact(constant | zero), compact(value))
        first = operands[0] if operands else None
        if isinstance(first, Value) and self.operation.__name__ == "_first":
            out.sums_to_one = first.sums_to_one

    def backward(self, step: Step) -> None:
        """An operand is needed where the result is and no other factor is zero."""
        (out,) = step.outputs
        operands = self._operands(step)
        for operand in {id(o): o for o in operands if isinstance(o, Value)}.values():
            others = [o for o in operands if o is not operand]
            needed = out.needed & ~self._zero(others)
            operand.need(shrink_to(needed, operand.shape))

    def agree(self, step: Step) -> Iterator[Value]:
        """Dimensions that are not broadcast lose the same indices."""
        (out,) = step.outputs
        dims = len(out.shape)
        for dim in range(dims):
            places = [(out, dim)]
            for value in step.inputs:
                own = dim - dims + len(value.shape)
                if own >= 0 and value.shape[own] == out.shape[dim]:
                    places.append((value, own))
            yield from alike(places)

    def _operands(self, step: Step) -> list[Any]:
        given = [*step.node.args]
        given += [step.node.kwargs["other"]] if "other" in step.node.kwargs else []
        return [step.value(a) or step.concrete(a) for a in given]

    def _zero(self, operands: list[Any]) -> Tensor:
        """Where a product is zero because one of its factors is."""
        zero = torch.zeros((), dtype=torch.bool)
        if self.operation is operator.mul:
            for operand in operands:
                if isinstance(operand, Value):
                    zero = zero | operand.known.zero
        return zero


class Comparison(Elementwise):
    """An elementwise node of which only the dimensions are followed: comparisons and choices."""

    def __init__(self) -> None:
        super().__init__(operator.is_)

    def forward(self, step: Step) -> None:
        """Nothing is known of the result."""


class PerChannel:
    """A normalisation by stored statistics: elementwise, with parameters along dimension 1."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, step: Step) -> None:
        """`(x - mean) / sqrt(var + eps) * weight + bias` where x is constant."""
        (out,), (x,) = step.outputs, step.values.values()
        if x.known.is_nothing:
            return
        shape = [-1 if dim == 1 else 1 for dim in range(len(x.shape))]
        part = {name: v.known.value.double().view(shape) for name, v in step.extra.items()}
        value = (x.known.value.double() - part["running_mean"]) * torch.rsqrt(
            part["running_var"] + self.eps
        )
        value = value * part.get("weight", 1.0) + part.get("bias", 0.0)
        out.known = Known(x.known.constant, compact(torch.where(x.known.constant, value, 0.0)))

    def backward(self, step: Step) -> None:
        """Needed where the result is."""
        (out,), (x,) = step.outputs, step.values.values()
        x.need(out.needed)

    def agree(self, step: Step) -> Iterator[Value]:
        """All lose the same channels."""
        (out,), (x,) = step.outputs, step.values.values()
        for dim in range(len(out.shape)):
            parameters = [(v, 0) for v in step.extra.values()] if dim == 1 else []
            yield from alike([(out, dim), (x, dim), *parameters])


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
