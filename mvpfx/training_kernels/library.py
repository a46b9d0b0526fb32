"""The native library of the training step: whether it is there, and what it does.

It is built with the package where there is a C++ compiler. Each function has a twin in plain
operations of torch that gives the same values, sums up to the order of their terms; callers ask
`serves` which to take.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from mvpfx.native import Interface
from mvpfx.torch_private import transforms_active
from mvpfx.traces import dispatch_modes_active

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "mvpfx_mask": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int)),
    "mvpfx_mask_gradients": (None, (*[c_void_p] * 5, c_int64, c_int)),
    "mvpfx_take_movement": (None, (*[c_void_p] * 4, c_float, c_int64, c_int)),
    "mvpfx_block_gradients": (None, (*[c_void_p] * 5, *[c_int64] * 4, c_int)),
    "mvpfx_pack_mask": (None, (c_void_p, c_void_p, c_int64, c_int)),
    "mvpfx_unpack_mask": (None, (c_void_p, c_void_p, c_int64, c_int)),
    "mvpfx_top": (c_int, (c_void_p, c_int64, c_int64, c_void_p)),
    "mvpfx_at_least": (None, (c_void_p, c_float, c_void_p, c_int64, c_int)),
    "mvpfx_split": (
        c_int64,
        (c_void_p, c_int64, c_float, c_float, POINTER(c_int64), c_void_p, c_int64, c_int),
    ),
}

_PLAIN, _SERVED = (Tensor, nn.Parameter), (torch.float32, torch.bool)


def serves(values: Tensor, *others: Tensor) -> bool:
    """Whether the library can compute with these: plain float32 on the CPU and bool beside it, of
    one shape, each without gaps; not traced, transformed or watched by a dispatch mode.
    """
    if LIBRARY is None or values.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or dispatch_modes_active() or transforms_active():
        return False
    shape = values.shape
    for each in (values, *others):  # asked several times a site and step: no generator
        if type(each) not in _PLAIN or each.dtype not in _SERVED or not each.is_cpu:
            return False
        if each.shape != shape or not each.is_contiguous():
            return False
    return True


def multiply(values: Tensor, mask: Tensor) -> Tensor:
    """`values * mask`, float32."""
    out = torch.empty_like(values)
    _library().mvpfx_mask(
        values.data_ptr(), mask.data_ptr(), out.data_ptr(), values.numel(), torch.get_num_threads()
    )
    return out


def gradients(gradient: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`gradient * mask` and `gradient * weight`, float32, in one pass."""
    masked, movement = torch.empty_like(gradient), torch.empty_like(gradient)
    pointers = [each.data_ptr() for each in (gradient, weight, mask, masked, movement)]
    _library().mvpfx_mask_gradients(*pointers, gradient.numel(), torch.get_num_threads())
    return masked, movement


def take_movement(
    gradient: Tensor, weight: Tensor, mask: Tensor, scores: Tensor, rate: float
) -> None:
    """`scores -= rate * gradient * weight`; `gradient *= mask`; float32, in place, one pass."""
    pointers = [each.data_ptr() for each in (gradient, weight, mask, scores)]
    _library().mvpfx_take_movement(*pointers, rate, gradient.numel(), torch.get_num_threads())


def block_gradients(
    gradient: Tensor, weight: Tensor, mask: Tensor, units: tuple[int, int], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`gradient * mask`, and `gradient * weight` summed over each block, float32, in one pass.

    Args:
        gradient: of any shape that is a matrix when flattened.
        weight: float32, of that shape.
        mask: bool, of that shape.
        units: number of blocks along (rows, columns) of that: the shape of the sums.
        block: rows and columns of a block.
    """
    masked = torch.empty_like(gradient)
    sums = torch.empty(units, dtype=torch.float32)
    pointers = [each.data_ptr() for each in (gradient, weight, mask, masked, sums)]
    (units_down, units_across), (rows, cols) = units, block
    _library().mvpfx_block_gradients(
        *pointers, units_down, rows, units_across, cols, torch.get_num_threads()
    )
    return masked, sums


def packs(mask: Tensor) -> bool:
    """Whether the library can hold this in a bit a value: plain bool on the CPU, without gaps."""
    plain = type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu
    return LIBRARY is not None and plain and mask.is_contiguous() and not dispatch_modes_active()


def pack(mask: Tensor) -> Tensor:
    """A bit a value, uint8, flat."""
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    _library().mvpfx_pack_mask(
        mask.data_ptr(), bits.data_ptr(), mask.numel(), torch.get_num_threads()
    )
    return bits


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The way back of `pack`: bool of this shape."""
    mask = torch.empty(shape, dtype=torch.bool)
    _library().mvpfx_unpack_mask(
        bits.data_ptr(), mask.data_ptr(), mask.numel(), torch.get_num_threads()
    )
    return mask


def top(values: Tensor, count: int) -> Tensor | None:
    """Mark the `count` greatest of few values, from 1 to all of them; of equal ones the first. None
    where a value is NaN.
    """
    out = torch.empty_like(values, dtype=torch.bool)
    pointers = values.data_ptr(), values.numel(), count, out.data_ptr()
    return out if _library().mvpfx_top(*pointers) else None


def at_least(values: Tensor, cut: float) -> Tensor:
    """`values >= cut`, bool."""
    out = torch.empty_like(values, dtype=torch.bool)
    _library().mvpfx_at_least(
        values.data_ptr(), cut, out.data_ptr(), values.numel(), torch.get_num_threads()
    )
    return out


def split(values: Tensor, low: float, high: float, inside: Tensor) -> tuple[int, int]:
    """How many of `values` are above `high`, and how many from `low` to `high`; these are -1 where
    a value is NaN.

    Args:
        values: float32.
        low: the least value in the bracket.
        high: the greatest in it.
        inside: float32; the values in the bracket are written to it, in any order, as many as fit.
    """
    above = c_int64()
    found: int = _library().mvpfx_split(
        values.data_ptr(),
        values.numel(),
        low,
        high,
        byref(above),
        inside.data_ptr(),
        inside.numel(),
        torch.get_num_threads(),
    )
    return above.value, found


def _library() -> ctypes.CDLL:
    assert LIBRARY is not None, "serves was asked"
    return LIBRARY


INTERFACE = Interface(_FUNCTIONS, "mvpfx_training_version", version=5)
LIBRARY = INTERFACE.find(Path(__file__).parent)
"""The library; None where it was not built or cannot be loaded."""
