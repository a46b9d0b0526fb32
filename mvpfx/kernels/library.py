"""The native library: whether it is there, and its functions with their C types.

It is built with the package where there is a C++ compiler; without it `torch.sparse` serves.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from mvpfx.native import Interface

MISSING = "the native kernels were not built with this installation: it takes a C++ compiler"

DTYPES = (torch.float32, torch.bfloat16)
"""What native kernels take."""
INSTRUCTIONS = ("amx", "avx512_bf16", "avx512", "avx2", "plain")
"""Instruction sets that kernels are compiled for, each with what those after it have."""


class CGeometry(ctypes.Structure):
    """How many tokens there are: `sequences` of `tokens` each, in tiles of `tile`."""

    _fields_ = (("sequences", c_int64), ("tokens", c_int64), ("tile", c_int64))


class CSlice(ctypes.Structure):
    """Features from `first` on, of tiled activations; `stride` floats from tile to tile.

    Where the stride is 0 they lie in memory of the tile's own, where it is negative there are none.
    `size` is how many floats there are at `data`.
    """

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("first", c_int64), ("size", c_int64))


class CEpilogue(ctypes.Structure):
    """What is done with a product: `activation(product + bias) * factor + addend`."""

    _fields_ = (
        ("bias", c_void_p),
        ("activation", c_int),
        ("factor", CSlice),
        ("addend", CSlice),
    )


class CStep(ctypes.Structure):
    """One step of a chain; `kind` says which members count.

    `bias_count` is that of the norm's bias or of the epilogue's, `tensor_count` how many numbers
    there are from the tensor's first to its last in memory.
    """

    _fields_ = (
        ("kind", c_int32),
        ("flag", c_int32),
        ("packed", c_void_p),
        ("input", CSlice),
        ("output", CSlice),
        ("features", c_int64),
        ("out_features", c_int64),
        ("epilogue", CEpilogue),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("epsilon", c_float),
        ("tensor", c_void_p),
        ("sequence_stride", c_int64),
        ("token_stride", c_int64),
        ("heads", c_int64),
        ("groups", c_int64),
        ("mask_strides", c_int64 * 4),
        ("weight_count", c_int64),
        ("bias_count", c_int64),
        ("tensor_count", c_int64),
    )


_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "mvpfx_isa": (c_char_p, ()),
    "mvpfx_use_isa": (c_int, (c_char_p,)),
    "mvpfx_tile": (c_int64, ()),
    "mvpfx_halves": (c_int, ()),
    "mvpfx_pack": (
        c_char_p,
        (*[c_int64] * 3, c_int, *[c_void_p, c_int64] * 3, POINTER(c_void_p)),
    ),
    "mvpfx_free": (None, (c_void_p,)),
    "mvpfx_run": (c_char_p, (POINTER(CGeometry), POINTER(CStep), c_int, c_int64, c_int)),
}


INTERFACE = Interface(_FUNCTIONS, "mvpfx_interface", version=5)


def no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native kernels cannot compute with a weight; None where they can."""
    if LIBRARY is None:
        return MISSING
    if device.type != "cpu":
        return f"native kernels are for CPUs, not for {device.type}"
    if dtype not in DTYPES:
        return f"native kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def isa() -> str | None:
    """The instruction set in use, one of `INSTRUCTIONS`; None without the library."""
    found = LIBRARY
    return None if found is None else found.mvpfx_isa().decode()


def tile_tokens() -> int:
    """Tokens of a tile, with the instruction set in use.

    Raises:
        RuntimeError: there is no library.
    """
    if LIBRARY is None:
        raise RuntimeError(f"{MISSING}; activations have no tiles")
    return LIBRARY.mvpfx_tile()


def use_isa(name: str) -> None:
    """Use another instruction set of this processor, for tests and measurements.

    Raises:
        ValueError: the processor does not have it, or there is no library.
    """
    found = LIBRARY
    if found is None or not found.mvpfx_use_isa(name.encode()):
        why = MISSING if found is None else f"this processor's is {isa()}"
        raise ValueError(f'instruction set "{name}" cannot be used: {why}.')


LIBRARY = INTERFACE.find(Path(__file__).parent)
"""The library; None where it was not built or cannot be loaded."""
