"""What a storage costs: measured milliseconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvpfx.storage import SparseLinear

COPIES_BYTES = 8 * 2**20
"""Bytes of copies of one weight that are gone through while timing it."""
MOST_COPIES = 8

LEAST_ROUNDS = 3
"""Timed calls of each function, however long one takes."""
MARGIN = 0.95
"""A storage is clearly faster where it takes less than this fraction of the dense time."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated timings, in milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float

    def is_clearly_below(self, other: Quartiles) -> bool:
        """Whether this is less than `MARGIN` of the other, and by more than both scatter.

        >>> Quartiles(2.0, 1.9, 2.2).is_clearly_below(Quartiles(3.0, 2.5, 4.0))
        True
        >>> Quartiles(2.0, 1.9, 2.6).is_clearly_below(Quartiles(3.0, 2.5, 4.0))
        False
        """
        return self.median_ms < MARGIN * other.median_ms and self.high_ms < other.low_ms


def compare(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    rounds: int = 11,
    warmup: int = 2,
    budget_seconds: float = math.inf,
) -> dict[str, Quartiles]:
    """Time functions in turn, round by round, so that a busy machine slows all of them alike.

    Args:
        functions: name -> call; results are dropped.
        device: where they run; on CUDA each call is timed with events.
        rounds: timed calls of each.
        warmup: calls of each before.
        budget_seconds: what all timed calls may take together, about: where `rounds` would take
            longer there are fewer, but no less than `LEAST_ROUNDS`.

    Returns:
        Median and quartiles by name. Compare their ratios, not the times.
    """
    clock = _cuda_ms if torch.device(device).type == "cuda" else _cpu_ms
    seconds = 0.0
    for _ in range(warmup):
        seconds = sum(clock(function) for function in functions.values()) / 1e3
    if seconds * rounds > budget_seconds:
        rounds = min(rounds, max(LEAST_ROUNDS, int(budget_seconds / seconds)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clock(function))
    return {name: quartiles(values) for name, values in times.items()}


def measure_storages(
    weight: Tensor,
    bias: Tensor | None,
    tokens: int,
    blocks: Mapping[str, int],
    rounds: int = 11,
    budget_seconds: float = math.inf,
) -> dict[str, Quartiles]:
    """Time `x W^T + b` with `W` `[N, K]` dense and in sparse storages, token-major in and out.

    Several copies of a small weight are gone through in turn, as the layers of a model are:
    otherwise the weight would sit in a cache that no model leaves it in.

    Args:
        weight: `[N, K]`; its strides are kept for the dense call.
        bias: `[N]` or None.
        tokens: rows of `x`.
        blocks: storage -> block size (1 for csr; native computes alike in any).
        rounds: timed rounds.
        budget_seconds: what they may take together, as in `compare`.

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
        times = compare(calls, weight.device, rounds, budget_seconds=budget_seconds)
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
