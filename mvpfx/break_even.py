"""Break-even densities: below which density a storage is faster than dense, where nothing is timed.

Dense products differ from processor to processor by more than sparse ones do, so each has tables of
its own, one a dtype.
"""

from __future__ import annotations

import torch

from mvpfx.kernels.library import INSTRUCTIONS, isa
from mvpfx.torch_private import has_amx, has_avx512_bf16

Limits = dict[str, dict[str, dict[int, float]]]
"""Storage (native kernels by instruction set) -> size of the weight -> tokens -> density."""

BREAK_EVEN: dict[str, Limits] = {
    "amx-float32": {
        "csr": {
            "small": {1: 0.0, 16: 0.07, 128: 0.13, 1024: 0.12},
            "large": {1: 0.07, 16: 0.25, 128: 0.19, 1024: 0.16},
        },
        "bsr": {
            "small": {1: 0.0, 16: 0.0, 128: 0.14, 1024: 0.11},
            "large": {1: 0.0, 16: 0.11, 128: 0.19, 1024: 0.16},
        },
        "native-avx512": {
            "small": {1: 0.0, 16: 0.34, 128: 0.5, 1024: 0.5},
            "large": {1: 0.12, 16: 0.5, 128: 0.5, 1024: 0.5},
        },
        "native-avx2": {
            "small": {1: 0.0, 16: 0.13, 128: 0.12, 1024: 0.11},
            "large": {1: 0.0, 16: 0.29, 128: 0.25, 1024: 0.23},
        },
        "native-plain": {
            "small": {1: 0.0, 16: 0.1, 128: 0.07, 1024: 0.05},
            "large": {1: 0.0, 16: 0.2, 128: 0.1, 1024: 0.1},
        },
    },
    "amx-bfloat16": {
        "csr": {
            "small": {1: 0.0, 16: 0.0, 128: 0.0, 1024: 0.0},
            "large": {1: 0.07, 16: 0.0, 128: 0.0, 1024: 0.0},
        },
        "bsr": {
            "small": {1: 0.0, 16: 0.0, 128: 0.0, 1024: 0.0},
            "large": {1: 0.0, 16: 0.0, 128: 0.0, 1024: 0.0},
        },
        "native-amx": {
            "small": {1: 0.13, 16: 0.02, 128: 0.0, 1024: 0.0},
            "large": {1: 0.5, 16: 0.13, 128: 0.0, 1024: 0.0},
        },
        "native-avx512_bf16": {
            "small": {1: 0.05, 16: 0.0, 128: 0.0, 1024: 0.0},
            "large": {1: 0.09, 16: 0.08, 128: 0.0, 1024: 0.0},
        },
        "native-avx512": {
            "small": {1: 0.17, 16: 0.0, 128: 0.0, 1024: 0.0},
            "large": {1: 0.18, 16: 0.09, 128: 0.0, 1024: 0.0},
        },
        "native-avx2": {
            "small": {1: 0.02, 16: 0.0, 128: 0.0, 1024: 0.0},
            "large": {1: 0.07, 16: 0.03, 128: 0.0, 1024: 0.0},
        },
        "native-plain": {
            "small": {1: 0.02, 16: 0.02, 128: 0.0, 1024: 0.0},
            "large": {1: 0.06, 16: 0.04, 128: 0.0, 1024: 0.0},
        },
    },
    "avx512_bf16-float32": {
        "csr": {
            "small": {1: 0.0, 16: 0.08, 128: 0.16, 1024: 0.14},
            "large": {1: 0.02, 16: 0.22, 128: 0.16, 1024: 0.12},
        },
        "bsr": {
            "small": {1: 0.0, 16: 0.03, 128: 0.09, 1024: 0.13},
            "large": {1: 0.03, 16: 0.09, 128: 0.15, 1024: 0.16},
        },
        "native-avx512": {
            "small": {1: 0.0, 16: 0.48, 128: 0.5, 1024: 0.5},
            "large": {1: 0.03, 16: 0.5, 128: 0.5, 1024: 0.5},
        },
        "native-avx2": {
            "small": {1: 0.0, 16: 0.26, 128: 0.5, 1024: 0.5},
            "large": {1: 0.0, 16: 0.45, 128: 0.5, 1024: 0.5},
        },
        "native-plain": {
            "small": {1: 0.0, 16: 0.22, 128: 0.23, 1024: 0.22},
            "large": {1: 0.0, 16: 0.32, 128: 0.25, 1024: 0.24},
        },
    },
    "avx512_bf16-bfloat16": {
        "csr": {
            "small": {1: 0.0, 16: 0.02, 128: 0.03, 1024: 0.03},
            "large": {1: 0.1, 16: 0.08, 128: 0.06, 1024: 0.05},
        },
        "bsr": {
            "small": {1: 0.0, 16: 0.0, 128: 0.04, 1024: 0.03},
            "large": {1: 0.08, 16: 0.05, 128: 0.06, 1024: 0.05},
        },
        "native-avx512_bf16": {
            "small": {1: 0.1, 16: 0.43, 128: 0.11, 1024: 0.3},
            "large": {1: 0.23, 16: 0.11, 128: 0.39, 1024: 0.37},
        },
        "native-avx512": {
            "small": {1: 0.07, 16: 0.35, 128: 0.29, 1024: 0.24},
            "large": {1: 0.24, 16: 0.16, 128: 0.31, 1024: 0.29},
        },
        "native-avx2": {
            "small": {1: 0.03, 16: 0.19, 128: 0.02, 1024: 0.08},
            "large": {1: 0.09, 16: 0.22, 128: 0.14, 1024: 0.22},
        },
        "native-plain": {
            "small": {1: 0.0, 16: 0.14, 128: 0.05, 1024: 0.04},
            "large": {1: 0.07, 16: 0.07, 128: 0.06, 1024: 0.04},
        },
    },
    "avx2-float32": {
        "native-avx2": {
            "small": {1: 0.0, 16: 0.3, 128: 0.5, 1024: 0.5},
            "large": {1: 0.04, 16: 0.4, 128: 0.5, 1024: 0.5},
        },
        "native-plain": {
            "small": {1: 0.0, 16: 0.22, 128: 0.21, 1024: 0.22},
            "large": {1: 0.02, 16: 0.35, 128: 0.25, 1024: 0.25},
        },
    },
    "avx2-bfloat16": {
        "native-avx2": {
            "small": {1: 0.0, 16: 0.5, 128: 0.5, 1024: 0.5},
            "large": {1: 0.05, 16: 0.5, 128: 0.5, 1024: 0.5},
        },
        "native-plain": {
            "small": {1: 0.0, 16: 0.5, 128: 0.5, 1024: 0.5},
            "large": {1: 0.05, 16: 0.5, 128: 0.5, 1024: 0.5},
        },
    },
}
"""Processor and dtype -> density below which each storage took less than `MARGIN` of the dense
time, transposes at both edges included. Measured by `benchmarks/break_even.py` on one thread;
`benchmarks/results/break_even/` holds the measurements behind it; those of "avx2" are of a
processor that has more, and was kept to AVX2: native kernels alone."""

ELSEWHERE = "amx"
"""Whose tables serve where a processor has none of a storage: dense products are faster nowhere, so
what they promise holds elsewhere too."""

LARGE_VALUES = 2**18
"""A weight of at least so many values is large: what a call costs besides counts for little."""


def processor() -> str:
    """What dense products on this CPU can use, one of `INSTRUCTIONS`; native kernels use `isa`."""
    if has_amx():
        return "amx"
    return "avx512_bf16" if has_avx512_bf16() else isa() or INSTRUCTIONS[-1]


def size_class(values: int) -> str:
    """Return "small" or "large" for a weight of so many values.

    >>> size_class(768 * 768)
    'large'
    """
    return "large" if values >= LARGE_VALUES else "small"


def storage_key(storage: str, dtype: torch.dtype) -> str:
    """A storage as tables name it: native kernels with the instruction set that products of this
    dtype use.
    """
    if storage != "native":
        return storage
    instructions = isa()
    if instructions in ("amx", "avx512_bf16") and dtype is torch.float32:
        instructions = "avx512"
    return f"native-{instructions}"


def break_even(storage: str, tokens: int, values: int, device: str, dtype: torch.dtype) -> float:
    """Density below which `storage` is faster than dense; 0.0 where nothing was measured.

    Between measured token counts the lower density counts, outside them the nearest.

    Args:
        storage: csr, bsr or native.
        tokens: rows of activations.
        values: size of the dense weight.
        device: its device type; only "cpu" was measured.
        dtype: its dtype.
    """
    if device != "cpu":
        return 0.0
    name, key = str(dtype).removeprefix("torch."), storage_key(storage, dtype)
    tables = (BREAK_EVEN.get(f"{found}-{name}", {}) for found in (processor(), ELSEWHERE))
    sizes = next((measured[key] for measured in tables if key in measured), None)
    if sizes is None:
        return 0.0
    table = sizes[size_class(values)]
    below = max((t for t in table if t <= tokens), default=min(table))
    above = min((t for t in table if t >= tokens), default=max(table))
    return min(table[below], table[above])
