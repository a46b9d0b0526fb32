"""Weights full of zeros in a file: the values that are not zero, and how far apart they are.

A packed tensor is two, `NAME.packed` and `NAME.gaps`: the k-th value stands
`gaps[0] + ... + gaps[k]` places after the place before the first. A gap is one byte; longer ones
are bridged by stored zeros.

The indices of a sparse matrix are gaps alone, from one stored value or block to the next, row by
row. Here a byte of 255 stands for no value: the gap goes on in the byte that follows.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

LONGEST = 255
WORTH = 0.9
"""A tensor is packed where that takes less than this fraction of its bytes."""
VALUES = ("exact", "bf16", "int8")
_QUANTIZED = 127


def is_worth_it(tensor: Tensor) -> bool:
    """Whether packing makes a tensor smaller."""
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    size = tensor.element_size()
    stored = int(torch.count_nonzero(tensor)) + tensor.numel() // LONGEST
    return stored * (size + 1) < WORTH * tensor.numel() * size


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[n]` and gaps uint8 `[n]` of a tensor of any shape."""
    flat = tensor.reshape(-1)
    places = flat.nonzero().flatten()
    gaps = torch.diff(places, prepend=places.new_tensor([-1]))
    bridges = (gaps - 1).div(LONGEST, rounding_mode="floor")
    ends = torch.arange(len(places)) + bridges.cumsum(0)
    last = int(places[-1]) if len(places) else -1
    # Zeros after the last value are bridged too, so a file's size tells what it can be unpacked to.
    count = len(places) + int(bridges.sum()) + (len(flat) - 1 - last) // LONGEST
    values, steps = flat.new_zeros(count), torch.full((count,), LONGEST, dtype=torch.uint8)
    values[ends] = flat[places]
    steps[ends] = (gaps - bridges * LONGEST).to(torch.uint8)
    return values, steps


def unpack(values: Tensor, gaps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `pack` took apart.

    Raises:
        ValueError: values and gaps do not fit one another, or lead out of the tensor.
    """
    if values.dim() != 1 or values.shape != gaps.shape or gaps.dtype != torch.uint8:
        raise ValueError(f"{list(values.shape)} values and {list(gaps.shape)} gaps do not fit")
    places = gaps.to(torch.int64).cumsum(0) - 1
    flat = values.new_zeros(torch.Size(shape).numel())
    if len(places) and (int(gaps.min()) < 1 or int(places[-1]) >= len(flat)):
        raise ValueError(f"its gaps lead to place {int(places[-1])} of {len(flat)}, or stand still")
    flat[places] = values
    return flat.view(shape)


def pack_indices(crow: Tensor, col: Tensor) -> tuple[Tensor, int] | None:
    """Gaps uint8 `[n]` of a matrix in CSR or BSR, and the columns they are counted in.

    None where the columns of a row are out of order, or where gaps take as many bytes as indices.
    """
    columns = int(col.max()) + 1 if len(col) else 1
    rows = torch.arange(len(crow) - 1).repeat_interleave(crow.diff().long())
    places = rows * columns + col
    gaps = torch.diff(places, prepend=places.new_tensor([-1]))
    if len(gaps) and int(gaps.min()) < 1:
        return None
    bridges = gaps.div(LONGEST, rounding_mode="floor")
    count = len(gaps) + int(bridges.sum())
    if count >= crow.nbytes + col.nbytes:
        return None
    steps = torch.full((count,), LONGEST, dtype=torch.uint8)
    steps[torch.arange(len(gaps)) + bridges.cumsum(0)] = (gaps % LONGEST).to(torch.uint8)
    return steps, columns


def unpack_indices(steps: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """`crow_indices` `[rows + 1]` and `col_indices` that `pack_indices` took apart.

    Raises:
        ValueError: the gaps lead out of the matrix, or stand still.
    """
    if steps.dim() != 1 or steps.dtype != torch.uint8:
        raise ValueError(f"its gaps are {steps.dtype} {list(steps.shape)}")
    ends = steps != LONGEST
    places = steps.to(torch.int64).cumsum(0)[ends] - 1
    risen = torch.diff(places, prepend=places.new_tensor([-1])) > 0
    if not bool(risen.all()) or (len(steps) and not bool(ends[-1])):
        raise ValueError("its gaps stand still, or end on the way")
    if len(places) and int(places[-1]) >= rows * columns:
        raise ValueError(f"its gaps lead to place {int(places[-1])} of {rows} x {columns}")
    counts = torch.bincount(places // columns, minlength=rows)
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return crow.to(torch.int32), (places % columns).to(torch.int32)


def as_shape(sizes: object) -> tuple[int, ...]:
    """A shape from a file.

    Raises:
        ValueError: it is something else.
    """
    found = cast("list[object]", sizes) if isinstance(sizes, list) else [None]
    numbers = tuple(size for size in found if isinstance(size, int) and type(size) is int)
    if len(numbers) != len(found) or any(size < 0 for size in numbers) or len(found) > 8:
        raise ValueError(f"{str(sizes)[:60]} is not a shape")
    return numbers


def as_scale(scale: object) -> float:
    """What values are multiplied by, from a file.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise ValueError(f"its scale is {scale!r}, which is not a number")
    if not 0 < scale < math.inf:
        raise ValueError(f"its scale is {scale!r}, and a finite number above 0 is needed")
    return float(scale)


def shorten(values: Tensor, how: str) -> tuple[Tensor, float]:
    """Values in fewer bytes, and what they are to be multiplied by."""
    if how == "bf16":
        return values.to(torch.bfloat16), 1.0
    if how == "int8":
        scale = float(values.abs().max()) / _QUANTIZED if values.numel() else 1.0
        scale = scale or 1.0
        return (values / scale).round().to(torch.int8), scale
    return values, 1.0


def lengthen(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What `shorten` was given, as near as it can be."""
    return values if values.dtype == dtype else (values.to(torch.float32) * scale).to(dtype)
