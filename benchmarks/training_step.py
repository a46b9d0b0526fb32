"""What does a training step with masks cost, beside the same step of dense fine-tuning?

    python -m benchmarks.training_step                       # every cell; hours on one core
    python -m benchmarks.training_step --shape MiniLM-L6 --tokens 800 --cases main --mode eager

A cell is a shape, a number of tokens a step, and eager or `torch.compile`. In each, every case is
built with random weights and AdamW (fused): first alone, for its peak memory, then in turns with
the dense step and a few others, for its time, over that of the dense step in the same round. The
naive module sorts its scores in every forward. With `--alone`, the exact threshold alone, and the
evaluation of a prepared model. With a CUDA device the same runs there. Cases of a cell that are in
the result file already are replaced, all others stay in it. With `--keep-memory`, freed memory
stays with the process in all cases, the dense one too, where the C library is glibc: as with
`MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TOP_PAD_=134217728`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import results_file
from benchmarks.measure import interleaved, quartiles, rounds_ms, synchronize
from benchmarks.training_cases import (
    ALL,
    COMPILED,
    DENSE,
    DENSITY,
    MAIN,
    MOVEMENT,
    OURS,
    SECOND_ORDER,
    SHAPES,
    Case,
    Shape,
    Step,
    make_step,
    peak_bytes,
    peak_of,
)
from mvpfx.cost import compare
from mvpfx.selection import find_cut
from mvpfx.top_v import top_v

RESULT = results_file.FOLDER / "training_step.json"
SETS = {"ours": OURS, "main": MAIN, "all": ALL, "second-order": SECOND_ORDER}
SCORES = 85_000_000
GROUP = 5
"""Cases that take turns with one dense step: so few that a machine stays what it is in a round."""
KEPT = {-1: 2**31 - 1, -2: 2**27, -3: 2**25}
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes, with `--keep-memory`."""


def measure_cell(
    shape: Shape, tokens: int, compiled: bool, cases: Sequence[Case], rounds: int, device: Any
) -> dict[str, Any]:
    """Time and peak memory of each case at one shape and number of tokens."""
    make = {c.name: partial(make_step, c, shape, tokens, device, compiled) for c in cases}
    peaks: dict[str, int] = {}
    for name, one in make.items():
        if not compiled:  # Inductor's own allocations, as it compiles, are not those of a step
            peaks[name] = peak_bytes(one, device)
    gc.collect()
    rows: list[dict[str, Any]] = []
    others = [name for name in make if name != DENSE.name]
    for start in range(0, len(others), GROUP):
        steps: dict[str, Step] = {
            name: make[name]() for name in (DENSE.name, *others[start : start + GROUP])
        }
        times = rounds_ms(steps, rounds, f"{shape.name}, {tokens} tokens", warmup_rounds=2)
        dense = times[DENSE.name]
        for name in list(steps)[1 if start else 0 :]:
            row: dict[str, Any] = {"case": name, "rounds": rounds}
            row["ms"] = asdict(quartiles(times[name]))
            row |= over_dense(times[name], dense)
            if peaks:
                row["peak_bytes"] = peaks[name]
                extra = (peaks[name] - peaks[DENSE.name]) / shape.prunable
                row["bytes_a_prunable_weight"] = round(extra, 2)
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items() if key != "ms"), flush=True)
        del steps
        gc.collect()
    return {
        "shape": shape.name,
        "tokens": tokens,
        "mode": "compiled" if compiled else "eager",
        "rows": rows,
    }


def keep_memory() -> None:
    """Have the C library keep what is freed, for the rest of the process.

    Raises:
        RuntimeError: it is not glibc, or refuses.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(*each) for each in KEPT.items()):
        raise RuntimeError("--keep-memory sets glibc's mallopt, which is not there or refuses")


def over_dense(times: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Quartiles of times over the dense ones of the same rounds."""
    ratios = quartiles([ms / base for ms, base in zip(times, dense, strict=True)])
    return {
        "time_over_dense": round(ratios.median, 3),
        "time_over_dense_quartiles": [round(ratios.q1, 3), round(ratios.q3, 3)],
    }


def measure_threshold(device: torch.device, count: int, rounds: int) -> dict[str, Any]:
    """The exact cut through many scores, beside plain passes over them."""
    random = torch.Generator(device).manual_seed(0)
    scores = torch.randn(count, generator=random, device=device)
    kept = round(DENSITY * count)

    def select() -> None:
        cut_of(scores, kept)
        synchronize()

    def add_up() -> None:
        scores.sum()
        synchronize()

    times = compare({"sum": add_up, "threshold": select}, rounds=rounds)
    return {
        "scores": count,
        "sum_ms": asdict(times["sum"]),
        "threshold_ms": asdict(times["threshold"]),
        "passes": round(times["threshold"].median_ms / times["sum"].median_ms, 2),
        "extra_memory": round(extra_bytes(partial(cut_of, scores, kept), device) / 4 / count, 4),
    }


def cut_of(scores: Tensor, count: int) -> None:
    """Find the threshold; on an accelerator, where it is not read back, with the mask it makes."""
    if scores.device.type == "cpu":
        find_cut([scores], count)
    else:
        top_v([scores], count)


def extra_bytes(call: Any, device: torch.device) -> int:
    """Most bytes that a call holds beside what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    options: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with profile(**options) as profiler, record_function("call"):
        call()
    return peak_of(profiler, "call")


def measure_evaluation(
    shape: Shape, tokens: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Forwards of a prepared model without gradients, beside those of the dense one."""
    steps = {case.name: make_step(case, shape, tokens, device) for case in (DENSE, MOVEMENT)}
    batch = {k: v for k, v in steps[DENSE.name].batch.items() if k != "labels"}
    models = {name: step.model.eval() for name, step in steps.items()}
    times = interleaved(models, batch, rounds, "evaluation")
    return {
        "shape": shape.name,
        "tokens": tokens,
        "ms": {name: asdict(quartiles(t)) for name, t in times.items()},
        **over_dense(times[MOVEMENT.name], times[DENSE.name]),
    }


def merged(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """What a result file has, with what was measured now put in its place."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(name) for name in ("shape", "tokens", "mode", "memory_kept"))

    for part in ("cells", "evaluation"):
        cells = {key(cell): cell for cell in old.get(part, [])}
        for cell in new[part]:
            before = cells.get(key(cell), {})
            cells[key(cell)] = {**cell, **rows_of(before, cell)}
        new[part] = list(cells.values())
    new["threshold"] = new["threshold"] or old.get("threshold")
    return new


def rows_of(*cells: dict[str, Any]) -> dict[str, Any]:
    """The rows of a cell, of each case the last; nothing where there are none."""
    rows = {row["case"]: row for cell in cells for row in cell.get("rows", [])}
    return {"rows": list(rows.values())} if rows else {}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, and write `results/training_step.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=[*SHAPES], action="append", help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help="default: 800 and 4096")
    parser.add_argument("--mode", choices=["eager", "compiled"], action="append")
    parser.add_argument("--cases", choices=[*SETS], default="all")
    parser.add_argument("--alone", action="store_true", help="threshold and evaluation only")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory is not returned")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default: 11)")
    parser.add_argument("--scores", type=int, default=SCORES, help="in the threshold alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.alone and options.keep_memory:
        parser.error("--keep-memory is for training steps; --alone measures none")
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [SHAPES[name] for name in options.shape or SHAPES]
    result: dict[str, Any] = {
        "benchmark": "training_step",
        "question": "What does a training step with masks cost, beside one of dense fine-tuning?",
        "environment": results_file.environment(device),
        "settings": {"density": DENSITY, "optimizer": "AdamW, fused", "sequences": 32},
        "cells": [],
        "evaluation": [],
        "threshold": None,
    }
    chosen = itertools.product(
        shapes, options.tokens or [800, 4096], options.mode or ["eager", "compiled"]
    )
    for shape, tokens, mode in () if options.alone else chosen:
        cases = COMPILED if mode == "compiled" else SETS[options.cases]
        cell = measure_cell(shape, tokens, mode == "compiled", cases, options.rounds, device)
        cell["memory_kept"] = options.keep_memory
        result["cells"].append(cell)
        results_file.write(options.output, merged(options.output, {**result}))
        torch.compiler.reset()
        gc.collect()
    if options.alone:
        result["threshold"] = measure_threshold(device, options.scores, options.rounds)
        for shape, tokens in itertools.product(shapes, options.tokens or [800]):
            row = measure_evaluation(shape, tokens, options.rounds, device)
            result["evaluation"].append(row)
        results_file.write(options.output, merged(options.output, result))
        print(result["threshold"], *result["evaluation"], sep="\n")


if __name__ == "__main__":
    main()
