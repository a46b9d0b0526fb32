r"""How fast is a sparse model on a CPU, beside the engines that one would use instead?

    python -m benchmarks.cpu_inference                              # everything; takes many hours
    python -m benchmarks.cpu_inference --model bert --pattern unstructured --dtype fp32 \
        --batch 1 --threads 1 --deepsparse-python ENVIRONMENT/bin/python

A cell is a model, a pattern of zeros, a density, a batch, a dtype and a number of threads. In each,
all engines run the same weights on the same batch, and take turns; the process is bound to as many
cores as there are threads, and every engine is told their number. What a turn is, and how each
engine is set up, says `benchmarks.engines`; what the models and zeros are, `inference_models`.

Each cell appends a line to `results/cpu_inference/<processor>.jsonl` when it is done. A cell whose
engines have all been measured is not measured again, so a run that was stopped is taken up where it
was; of two lines of a cell the last one counts. Each number of threads has a process of its own.

deepsparse needs an environment of its own: `python3 -m venv deepsparse_env &&
deepsparse_env/bin/pip install deepsparse==1.8.0 'numpy<2' 'onnx<1.17'`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import engines, inference_models, measure, results_file
from benchmarks.deepsparse_engine import deepsparse_version
from benchmarks.engines import ENGINES, REFERENCE, Engine, Task
from benchmarks.hybrid_latency import DTYPES
from benchmarks.inference_cells import RESULT, Cell, cells, done
from benchmarks.inference_models import MODELS, PATTERNS

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.03)
BATCHES = (1, 16)
THREADS = (1, 2)
ROUNDS = 15
TOLERANCE = 1e-3
"""Of outputs in float32, absolute up to outputs of 1 and relative above."""


def is_done(line: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    """Whether a line has all that can be measured now of what is asked for."""
    if line is None or options.again or line["rounds"] < options.rounds:
        return False
    unknown = {"left_out": "nobody asked for it"}
    return all(
        "left_out" not in line["engines"].get(name, unknown)
        for name in options.engines
        if engines.missing(name, options.deepsparse_python) is None
    )


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell, in this process. Returns its line, without the environment."""
    model = MODELS[cell.model]
    rows, columns = map(int, (cell.block or "1x1").split("x"))
    dense = inference_models.build(model)
    zeroed = inference_models.zeroed(dense, model, cell.pattern, cell.density, (rows, columns))
    del dense
    with pinned(cell.threads) as cores, tempfile.TemporaryDirectory() as folder:
        task = Task(
            zeroed.to(DTYPES[cell.dtype]),
            inference_models.tensors(model, cell.batch),
            inference_models.settings(model),
            cell.dtype,
            cell.threads,
            Path(folder),
            options.deepsparse_python,
        )
        with torch.no_grad(), contextlib.ExitStack() as stack:
            ready, answers = set_up(task, options.engines, stack)
            turns = {name: engine.turn for name, engine in ready.items()}
            times = measure.turns_ms(turns, options.rounds, str(cell), warmup_rounds=1)
    for name, found in times.items():
        milliseconds = {key: round(value, 4) for key, value in asdict(found).items()}
        faster = round(times[REFERENCE].median / found.median, 4)
        answers[name] = {**milliseconds, "faster": faster, **answers[name]}
    return {
        "cell": asdict(cell),
        "shape": asdict(model.shape),
        "rounds": options.rounds,
        "cores": cores,
        "engines": answers,
    }


def set_up(
    task: Task, names: list[str], stack: contextlib.ExitStack
) -> tuple[dict[str, Engine], dict[str, dict[str, Any]]]:
    """Make the engines ready, the reference first, and compare what they return with its scores.

    Returns:
        The engines that run, which `stack` closes; and for each name what is known about it before
        it is timed, or why it is not.
    """
    ready: dict[str, Engine] = {}
    answers: dict[str, dict[str, Any]] = {}
    wanted: Tensor | None = None
    for name in [REFERENCE, *(name for name in names if name != REFERENCE)]:
        reason = engines.missing(name, task.deepsparse_python)
        if reason is not None:
            answers[name] = {"left_out": reason}
            continue
        try:
            engine = ENGINES[name](task)
            stack.callback(engine.close)
            found = engine.output()
            wanted = found if wanted is None else wanted
            difference = differing(wanted, found, task.dtype)
        except Exception as error:
            if name in engines.OWN:
                raise
            # Whatever a peer raises is its answer.
            answers[name] = {"cannot": " ".join(f"{type(error).__name__}: {error}".split())}
            continue
        ready[name] = engine
        answers[name] = {"largest_output_difference": difference, **engine.details}
    return ready, answers


def differing(wanted: Tensor, found: Tensor, dtype: str) -> float:
    """The largest absolute difference of outputs.

    Raises:
        RuntimeError: in float32 they differ so far that something else was computed, whose time
            tells nothing. In bf16 sums over few values may differ by much.
    """
    difference = (found - wanted).abs().max().item()
    most = TOLERANCE * max(1.0, wanted.abs().max().item())
    if dtype == "fp32" and not difference <= most:
        raise RuntimeError(
            f"its outputs differ from those of {REFERENCE} by {difference:.1e}; at most {most:.1e} "
            "was to be expected"
        )
    return difference


@contextlib.contextmanager
def pinned(threads: int) -> Generator[list[int]]:
    """Bind this process, and those that it starts, to as many cores as threads; tell torch so.

    Yields:
        The cores; none where the system binds no processes.

    Raises:
        ValueError: this process may not use that many.
    """
    before = torch.get_num_threads()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if allowed and len(allowed) < threads:
        raise ValueError(
            f"{threads} threads want as many cores, and this process may use {len(allowed)} "
            f"({allowed}). Ask for fewer: --threads {len(allowed)}"
        )
    _bind(allowed[:threads])
    torch.set_num_threads(threads)
    try:
        yield allowed[:threads]
    finally:
        _bind(allowed)
        torch.set_num_threads(before)


def _bind(cores: list[int]) -> None:
    if cores:  # a thread is bound by itself, not by the one that started it
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(int(thread.name), cores)


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of the engines of others.

    Raises:
        RuntimeError: there is no deepsparse where there should be.
    """
    python: Path | None = options.deepsparse_python
    if "deepsparse" not in options.engines:
        python = None
    return {
        "onnxruntime": results_file.installed("onnxruntime"),
        "openvino": results_file.installed("openvino"),
        "deepsparse": deepsparse_version(python) if python else "not asked",
    }


def run_all(options: argparse.Namespace) -> None:
    """Measure the cells that are not done, and append their lines."""
    asked = cells(options)
    environment = {
        **results_file.environment(torch.device("cpu")),
        "flags": results_file.processor_flags(),
        **versions(options),
    }
    for number, cell in enumerate(asked, 1):
        if is_done(done(options.output).get(cell), options):
            continue
        line = run(cell, options)
        line["environment"] = {**environment, "threads": cell.threads}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{number} of {len(asked)}: {cell}\n  {summary(line)}", flush=True)
        gc.collect()  # models refer to their graphs, and these to them


def summary(line: dict[str, Any]) -> str:
    """The medians of a line."""
    return "  ".join(
        f"{name} {found['median']:.1f} ms" if "median" in found else f"{name} -"
        for name, found in line["engines"].items()
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(flag: str, kind: type, values: Any, choices: Any = None, **more: Any) -> None:
        parser.add_argument(
            flag, type=kind, nargs="+", default=list(values), choices=choices, **more
        )

    several("--model", str, MODELS, MODELS)
    several("--pattern", str, PATTERNS, PATTERNS)
    several("--density", float, DENSITIES)
    several("--batch", int, BATCHES)
    several("--dtype", str, DTYPES, DTYPES)
    several("--threads", int, THREADS, help="of every engine, and cores to run on")
    several("--engines", str, ENGINES, ENGINES, help=f"{REFERENCE} always runs")
    parser.add_argument("--block", default="4x4", help="rows x columns of the pattern blocks")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed calls of each engine")
    parser.add_argument("--deepsparse-python", type=Path, help="of an environment that has it")
    parser.add_argument("--again", action="store_true", help="measure what has a line, too")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", options.block):
        parser.error(f"--block {options.block}: rows x columns are needed, as in 4x4")
    if not all(0 < density <= 1 for density in options.density):
        parser.error(f"--density {options.density}: a fraction kept, above 0 and at most 1")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: at least 2 are needed for quartiles")
    peers = [name for name in options.engines if name not in engines.OWN]
    if peers and results_file.KEPT_TO:
        # deepsparse has NM_ARCH, with which it still writes machine code for AVX-512.
        own = " ".join(engines.OWN)
        parser.error(f"--engines {' '.join(peers)}: nothing keeps them to AVX2; name {own}")
    python: Path | None = options.deepsparse_python
    if python is not None and not python.is_file():
        parser.error(f"--deepsparse-python {python}: there is no such file; give a python")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    if len(options.threads) == 1:
        run_all(options)
        return
    for threads in options.threads:  # pools of threads keep the size that they began with
        command = [sys.executable, "-m", "benchmarks.cpu_inference", *words]
        status = subprocess.run([*command, "--threads", str(threads)]).returncode
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
