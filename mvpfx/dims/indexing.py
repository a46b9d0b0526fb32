"""`table[numbers]`: slices of a tensor that another tensor chooses along the first dimension.

Tables of position biases are read so, by the distance of two places, as `[distances, heads]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, compact

CHOSEN = "a tensor chooses among them"


class Indexed:
    """The dimensions of the numbers stand in the result where the table's first one stood."""

    def forward(self, step: Step) -> None:
        """Constant where all that may be chosen is the same constant."""
        (out,), table = step.outputs, step.inputs[0]
        known = table.known
        value = known.value.double()
        first = value.narrow(0, 0, 1)
        same = known.constant.all(dim=0, keepdim=True) & (value == first).all(dim=0, keepdim=True)
        if not bool(same.any()):
            return
        shape = (*(1 for _ in step.inputs[1].shape), *same.shape[1:])
        out.known = Known(
            compact(same.reshape(shape)), torch.where(same, first, 0.0).reshape(shape)
        )

    def backward(self, step: Step) -> None:
        """What is needed anywhere in the result is needed all along the first dimension."""
        (out,), (table, numbers) = step.outputs, step.inputs
        needed = out.needed
        for _ in numbers.shape:
            needed = needed.any(dim=0)
        table.need(needed.unsqueeze(0))
        numbers.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """The table's other dimensions go with the last ones of the result."""
        (out,), (table, numbers) = step.outputs, step.inputs
        rank = len(numbers.shape)
        chosen = [(table, 0), *((out, dim) for dim in range(rank)), *all_dims(numbers)]
        yield from stay(chosen, CHOSEN)
        for dim in range(1, len(table.shape)):
            yield from alike([(table, dim), (out, rank + dim - 1)])


def find_indexed(step: Step) -> Indexed | None:
    """The rule of a step that reads a table at the numbers of one tensor; None for any other."""
    if step.name not in ("getitem", "__getitem__") or len(step.outputs) != 1:
        return None
    index = step.node.args[1]
    items = list(step.values.values())
    if not isinstance(index, fx.Node) or len(items) != 2 or items[1] is not step.value(index):
        return None
    dtype = getattr(index.meta.get("val"), "dtype", None)
    if dtype not in (torch.int64, torch.int32) and not items[1].follows:
        return None
    numbers, table, out = items[1], items[0], step.outputs[0]
    fits = out.shape == (*numbers.shape, *table.shape[1:])
    return Indexed() if fits and not _holds_bools(numbers) else None


def _holds_bools(numbers: Value) -> bool:
    return numbers.known.is_all and numbers.known.value.dtype == torch.bool
