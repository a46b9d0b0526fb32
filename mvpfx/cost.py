"""What a storage costs: bytes, measured milliseconds, and the density below which it is faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvpfx.kernels.library import isa
from mvpfx.storage import SparseLinear

INDEX_BYTES = 4
COPIES_BYTES = 8 * 2**20
"""Bytes of copies of one weight that are gone through while timing it."""
MOST_COPIES = 8

BREAK_EVEN: dict[str, dict[str, dict[str, dict[int, float]]]] = {
    "cpu": {
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
    }
}
"""Device type -> storage (native kernels by instruction set) -> size of the weight -> tokens ->
density below which the storage took less than `MARGIN` of the dense time, transposes at both edges
included. Measured by `benchmarks/break_even.py`, float32, one thread;
`benchmarks/results/break_even/` holds the measurements behind it."""

LARGE_VALUES = 2**18
"""A weight of at least so many values is large: what a call costs besides counts for little."""

MARGIN = 0.95
"""A storage is clearly faster where it takes less than this fraction of the dense time."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated timings, in milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float


def storage_bytes(
    storage: str, shape: tuple[int, ...], nonzero: int, itemsize: int, block: int = 1
) -> int:
    """Bytes of a weight in a storage.

    Args:
        storage: dense, reduced, csr, bsr or native, which keeps what csr does.
        shape: of the weight as stored (after shrinking).
        nonzero: stored values; for BSR the values of all stored blocks.
        itemsize: bytes a value.
        block: BSR's block size.

    Raises:
        ValueError: the storage is unknown.

    >>> storage_bytes("dense", (384, 1536), 58982, 4), storage_bytes("csr", (384, 1536), 58982, 4)
    (2359296, 473396)
    """
    if storage in ("dense", "reduced"):
        return math.prod(shape) * itemsize
    if storage in ("csr", "native"):
        return nonzero * (itemsize + INDEX_BYTES) + (shape[0] + 1) * INDEX_BYTES
    if storage == "bsr":
        indices = nonzero // block**2 + shape[0] // block + 1
        return nonzero * itemsize + indices * INDEX_BYTES
    raise ValueError(f"unknown storage {storage!r}; known: dense, reduced, csr, bsr, native")


def size_class(values: int) -> str:
    """Return "small" or "large" for a weight of so many values."""
    return "large" if values >= LARGE_VALUES else "small"


def break_even(storage: str, tokens: int, values: int, device: str, dtype: torch.dtype) -> float:
    """Density below which `storage` is faster than dense; 0.0 where nothing was measured.

    Between measured token counts the lower density counts, outside them the nearest.

    Args:
        storage: csr, bsr or native.
        tokens: rows of activations.
        values: size of the dense weight.
        device: its device type.
        dtype: its dtype; only float32 was measured.
    """
    known = f"native-{isa()}" if storage == "native" else storage
    sizes = BREAK_EVEN.get(device, {}).get(known)
    if not sizes or dtype is not torch.float32:
        return 0.0
    table = sizes[size_class(values)]
    below = max((t for t in table if t <= tokens), default=min(table))
    above = min((t for t in table if t >= tokens), default=max(table))
    return min(table[below], table[above])


def compare(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    rounds: int = 11,
    warmup: int = 2,
) -> dict[str, Quartiles]:
    """Time functions in turn, round by round, so that a busy machine slows all of them alike.

    Args:
        functions: name -> call; results are dropped.
        device: where they run; on CUDA each call is timed with events.
        rounds: timed calls of each.
        warmup: calls of each before.

    Returns:
        Median and quartiles by name. Compare their ratios, not the times.
    """
    clock = _cuda_ms if torch.device(device).type == "cuda" else _cpu_ms
    for _ in range(warmup):
        for function in functions.values():
            clock(function)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clock(function))
    return {name: quartiles(values) for name, values in times.items()}


def measure_storages(
    weight: Tensor, bias: Tensor | None, tokens: int, blocks: Mapping[str, int], rounds: int = 11
) -> dict[str, Quartiles]:
    """Time `x W^T + b` with `W` `[N, K]` dense and in sparse storages, token-major in and out.

    Several copies of a small weight are gone through in turn, as the layers of a model are:
    otherwise the weight would sit in a cache that no model leaves it in.

    Args:
        weight: `[N, K]`; its strides are kept for the dense call.
        bias: `[N]` or None.
        tokens: rows of `x`.
        blocks: storage -> block size (1 for csr and native).
        rounds: timed rounds.

    Returns:
        "dense" and each storage -> quartiles of the milliseconds of one call.
    """
    # Fixed values: the random generator is the user's.
    x = torch.linspace(-1, 1, tokens * weight.shape[1], device=weight.device)
    x = x.to(weight.dtype).view(tokens, -1)
    copies = max(1, min(MOST_COPIES, COPIES_BYTES // (weight.numel() * weight.element_size())))
    dense = [weight.clone() for _ in range(copies)]
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: [F.linear(x, w, bias) for w in dense]
    }
    for name, block in blocks.items():
        layout = "tiled" if name == "native" else "token_major"
        layers = [SparseLinear.from_dense(weight, bias, block, layout) for _ in range(copies)]
        # A new view each time: a layer would know the same tensor again.
        calls[name] = lambda layers=layers: [layer(x.view_as(x)) for layer in layers]
    with torch.no_grad():
        times = compare(calls, weight.device, rounds)
    return {
        name: Quartiles(t.median_ms / copies, t.low_ms / copies, t.high_ms / copies)
        for name, t in times.items()
    }


def quartiles(values_ms: list[float]) -> Quartiles:
    """Median and quartiles of a list of timings.

    >>> quartiles([3.0, 1.0, 2.0])
    Quartiles(median_ms=2.0, low_ms=1.5, high_ms=2.5)
    """
    if len(values_ms) < 2:
        return Quartiles(values_ms[0], values_ms[0], values_ms[0])
    low, median, high = statistics.quantiles(values_ms, n=4, method="inclusive")
    return Quartiles(median, low, high)


def _cpu_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
