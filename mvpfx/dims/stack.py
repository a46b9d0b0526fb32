"""Experts of a mixture: matrices stacked in one tensor, from which the input chooses.

Shapes: `X` experts, `T` tokens in the order of their experts, `K` and `N` features. A feature is
followed along the whole stack: it is dead where it is dead in every expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.dims.contraction import Contraction
from mvpfx.dims.rule import Rule, Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, compact
from mvpfx.program import Program

CHOSEN = "the router chooses among experts"
ALIGNMENT_BYTES = 16
"""What rows of a grouped matmul are multiples of; its kernel refuses others."""


@dataclass(frozen=True, eq=False)
class GroupedProduct(Contraction):
    """`out[t] = x[t] y[e]`, `e` the expert of token `t`, with letters `tk,ekn->tn`."""

    def forward(self, step: Step) -> None:
        """Zero where it is for every expert."""
        x, y, _ = self.parts(step)
        (out,) = step.outputs
        y.multiple = out.multiple = ALIGNMENT_BYTES // step.node.meta["val"].element_size()
        moving = self._product((~x.known.zero).float(), (~y.known.zero).float())
        _set_zero(out, moving == 0)

    def backward(self, step: Step) -> None:
        """A feature is needed where any expert reads it for a result that is."""
        x, y, _ = self.parts(step)
        x.need(self._needed(step.outputs[0].needed, self.x, self.y, y, x))
        for value in list(step.values.values())[1:]:
            value.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """Features go as in any product; experts and tokens stay."""
        x, y, _ = self.parts(step)
        (out,) = step.outputs
        rest = list(step.values.values())[2:]
        yield from stay([(x, 0), (y, 0), (out, 0), *all_dims(*rest)], CHOSEN)
        yield from super().agree(step)


@dataclass(eq=False)
class Stack:
    """A parameter of stacked experts.

    Attributes:
        value: the parameter.
        dim: its dimension of hidden units, or of rows that make them.
        first: the number of its first row, of all rows that make the units.
    """

    value: Value
    dim: int
    first: int = 0


class Choice:
    """`table[numbers]`: parts of a parameter that the input chooses along its first dimension."""

    def forward(self, step: Step) -> None:
        """Zero where it is in every part."""
        (out,), table = step.outputs, step.inputs[0]
        _set_zero(out, table.known.zero.all(dim=0, keepdim=True))

    def backward(self, step: Step) -> None:
        """The numbers are needed; the table follows."""
        for value in step.inputs:
            value.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """All but the first dimension goes along."""
        (out,), (table, *numbers) = step.outputs, step.inputs
        yield from stay([(out, 0), (table, 0), *all_dims(*numbers)], CHOSEN)
        for dim in range(1, len(out.shape)):
            yield from alike([(out, dim), (table, dim)])


def find_stack(step: Step) -> Rule | None:
    """The rule of a step that reads a stack of experts; None for any other."""
    given = list(step.values.values())
    shapes = [len(value.shape) for value in given]
    if step.name == "_grouped_mm":
        if shapes[:2] == [2, 3] and step.argument(3, "bias") is None:
            return GroupedProduct("tk", "ekn", "tn", (0, 1, None))
        return None
    chosen = step.name == "__getitem__" and len(given) == 2 and shapes[1] == 1
    if chosen and given[0].follows and len(step.outputs[0].shape) == shapes[0]:
        return Choice() if isinstance(step.node.args[1], type(step.node)) else None
    return None


def _set_zero(out: Value, zero: Tensor) -> None:
    if bool(zero.any()):
        nothing = torch.zeros((1,) * len(out.shape), dtype=torch.float64)
        out.known = Known(compact(zero), nothing)


def zero_slices(stack: Tensor, dim: int) -> Tensor:
    """`[X, size]`: which slices along `dim` of each matrix are zero."""
    return ~(stack != 0).any(dim=3 - dim)


def write_units(program: Program, stack: Stack, order: Tensor, dead: Tensor, table: Tensor) -> bool:
    """Put a stack's units in `order`, those that are dead as zeros; whether that changed it.

    Args:
        program: takes the new value.
        stack: what is written.
        order: `[X, K]`, the old place of the unit at each place.
        dead: `[X, K]`, by old places.
        table: `[K, m]`, the stack's slices that belong to each unit.
    """
    old = program.parameter(stack.value.name)
    assert old is not None
    source = torch.arange(old.shape[stack.dim]).repeat(len(order), 1)
    source[:, table.flatten()] = table[order].flatten(1)
    gone = torch.zeros(source.shape, dtype=torch.bool)
    lost = torch.gather(dead, 1, order)[:, :, None].expand(-1, -1, table.shape[1])
    gone[:, table.flatten()] = lost.flatten(1)
    if old.dim() == 3:
        other = 3 - stack.dim
        source, gone = source.unsqueeze(other), gone.unsqueeze(other)
    source, gone = source.to(old.device), gone.to(old.device)
    new = torch.gather(old.detach(), stack.dim, source.expand_as(old)).masked_fill(gone, 0)
    if torch.equal(new, old):
        return False
    program.parameters[stack.value.name] = new
    return True
