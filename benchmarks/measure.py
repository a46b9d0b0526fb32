"""Latency, bytes and parameters of models that are compared with one another."""

from __future__ import annotations

import io
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.training import to_device
from benchmarks.workloads import Batch


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile, milliseconds."""

    q1: float
    median: float
    q3: float


def interleaved_ms(
    models: dict[str, nn.Module], batch: Batch, rounds: int, label: str = "latency"
) -> dict[str, Quartiles]:
    """Time one forward of each model in turn, `rounds` times.

    Taking turns gives every model the same share of whatever else the machine does. The order
    within a round alternates; three rounds to warm up are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    inputs = {name: to_device(batch, model.eval()) for name, model in models.items()}
    with torch.no_grad():
        for turn in tqdm(range(-3, rounds), desc=label, mininterval=1.0):
            for name in list(models)[:: 1 if turn % 2 else -1]:
                synchronize()
                start = time.perf_counter()
                models[name](**inputs[name])
                synchronize()
                if turn >= 0:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: Quartiles(*statistics.quantiles(times[name], n=4)) for name in models}


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
