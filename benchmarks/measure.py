"""Latency, bytes and parameters of models that are compared with one another."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.training import to_device
from benchmarks.workloads import Batch


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile; milliseconds, unless said otherwise."""

    q1: float
    median: float
    q3: float


def interleaved_ms(
    models: dict[str, nn.Module], batch: Batch, rounds: int, label: str = "latency"
) -> dict[str, Quartiles]:
    """Quartiles of what `interleaved` measures."""
    times = interleaved(models, batch, rounds, label)
    return {name: quartiles(found) for name, found in times.items()}


def interleaved(
    models: dict[str, nn.Module], batch: Batch, rounds: int, label: str = "latency"
) -> dict[str, list[float]]:
    """Milliseconds of one forward of each model in turn, `rounds` times, as `rounds_ms` takes."""
    inputs = {name: to_device(batch, model.eval()) for name, model in models.items()}

    def timed(name: str) -> float:
        synchronize()
        start = time.perf_counter()
        models[name](**inputs[name])
        synchronize()
        return 1000 * (time.perf_counter() - start)

    with torch.no_grad():
        return rounds_ms({name: partial(timed, name) for name in models}, rounds, label)


def turns_ms(
    turns: Mapping[str, Callable[[], float]], rounds: int, label: str, warmup_rounds: int = 3
) -> dict[str, Quartiles]:
    """Quartiles of what `rounds_ms` measures."""
    times = rounds_ms(turns, rounds, label, warmup_rounds)
    return {name: quartiles(found) for name, found in times.items()}


def rounds_ms(
    turns: Mapping[str, Callable[[], float]], rounds: int, label: str, warmup_rounds: int = 3
) -> dict[str, list[float]]:
    """Give each its turn, `rounds` times; a turn returns the milliseconds that count.

    Taking turns gives each the same share of whatever else the machine does. The order within a
    round alternates; the first rounds, to warm up, are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in tqdm(range(-warmup_rounds, rounds), desc=label, mininterval=1.0):
        for name in list(turns)[:: 1 if number % 2 else -1]:
            milliseconds = turns[name]()
            if number >= 0:
                times[name].append(milliseconds)
    return times


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least two values."""
    return Quartiles(*statistics.quantiles(values, n=4))


def synchronize() -> None:
    """Wait until the accelerator, if one is in use, has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def file_bytes(model: nn.Module) -> int:
    """Size of the model's `state_dict` as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def parameters_outside_embeddings(model: nn.Module) -> int:
    """Parameters of a model, each counted once; embeddings are not pruned and stay out."""
    return sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
