"""Where does the time of a converted model go, and what could its products still gain?

    python -m benchmarks.inference_profile                  # needs Linux's `perf`; 10 minutes

BERT-base's shape, float32, one thread, random zeros in single weights, all as in
`benchmarks.cpu_inference`. `perf` samples the process by the clock while the model runs, and every
sample counts for what the function that it hit computes. The rate of the products is that of the
multiplications and additions of nonzeros. Beside it stands, from the same run, the rate of the same
kernel on weights without zeros, which is what it can do, and how long a call would take if its
products had that rate and nothing else changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks import inference_models, measure, results_file
from benchmarks.engines import ENGINES, Engine, Task
from benchmarks.inference_models import FOR_PEOPLE, MODELS
from benchmarks.kernel_rate import entering, multiplying
from mvpfx.cost import compare
from mvpfx.kernels.library import isa
from mvpfx.storage import SparseLinear

BEGIN = "<!-- inference profile: made by python -m benchmarks.readme -->"
END = "<!-- end of inference profile -->"
FOLDER = results_file.FOLDER / "inference_profile"
MODEL, ENGINE = "bert", "mvpfx"
HERTZ = 1999
SHOWN = 0.001
"""Functions with less of the time are not listed."""
REST = "torch and Python"
KINDS = {
    "multiply": "products",
    "attend": "attention",
    "gelus": "activations and sums",
    "finish": "activations and sums",
    "normalize": "norms",
}
"""What a native function computes, by how its name begins."""
OTHER = "other native"


def kind(library: str, function: str) -> str:
    """What a function computes, as `perf` names it and the library that it is in."""
    if not library.startswith("_native"):
        return REST
    name = function.rpartition("] ")[2].partition("<")[0].rpartition("::")[2]
    return next((what for start, what in KINDS.items() if name.startswith(start)), OTHER)


def read_report(text: str) -> dict[tuple[str, str], float]:
    """Shares of time by library and function, from what `perf report` prints with `;` between."""
    lines = (line.split(";", 2) for line in text.splitlines() if line.strip() and line[0] != "#")
    shares: dict[tuple[str, str], float] = defaultdict(float)
    for percent, library, function in lines:
        shares[library.strip(), function.strip()] += float(percent.strip().rstrip("%")) / 100
    return dict(shares)


def sampled(call: Callable[[], object], seconds: int) -> dict[tuple[str, str], float]:
    """Shares of time by library and function, while `call` is called over and over.

    Raises:
        RuntimeError: there is no `perf`, or it may not look.
    """
    perf = shutil.which("perf")
    if perf is None:
        raise RuntimeError(
            "there is no perf on this machine. Install it (linux-perf or linux-tools, as the "
            "system calls it), or time models without: python -m benchmarks.cpu_inference"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "perf.data")
        record = [perf, "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-p", str(os.getpid())]
        process = subprocess.Popen(
            [*record, "-o", file, "--", "sleep", str(seconds)],
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None:
            call()
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(
                f"perf record ended with {process.returncode}: {' '.join(said.split())}. Where it "
                "is not permitted, lower kernel.perf_event_paranoid or run as root"
            )
        report = [perf, "report", "-i", file, "--stdio", "--no-children", "-g", "none", "-t", ";"]
        shown = subprocess.run(
            [*report, "-F", "overhead,dso,symbol"], capture_output=True, text=True, check=True
        )
    return read_report(shown.stdout)


def gflops_without_zeros(linears: Mapping[str, nn.Linear], tokens: int, rounds: int) -> float:
    """Billions of multiplications and additions a second of the native kernel on weights of the
    linears' shapes that have no zeros: rows share every column then, and each is read once for all.
    """
    shapes = Counter((linear.out_features, linear.in_features) for linear in linears.values())
    calls: dict[str, Callable[[], object]] = {}
    for shape in shapes:
        layer = SparseLinear.from_dense(torch.randn(shape), None, output_layout="tiled")
        (tiles,) = entering(shape[1])(torch.randn(tokens, shape[1]))
        calls[str(shape)] = partial(multiplying(*shape), tiles, layer)
    times = compare(calls, rounds=rounds)
    milliseconds = sum(n * times[str(shape)].median_ms for shape, n in shapes.items())
    operations = sum(n * 2 * shape[0] * shape[1] * tokens for shape, n in shapes.items())
    return operations / milliseconds / 1e6


def profile(density: float, batch: int, seconds: int, rounds: int) -> dict[str, Any]:
    """One row: the times of a call, what it spends them on, and the rates."""
    model = MODELS[MODEL]
    zeroed = inference_models.zeroed(
        inference_models.build(model), model, "unstructured", density, (1, 1)
    )
    linears = inference_models.pruned_linears(zeroed)
    nonzeros = sum(int(linear.weight.count_nonzero()) for linear in linears.values())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        task = Task(
            zeroed,
            inference_models.tensors(model, batch),
            inference_models.settings(model),
            "fp32",
            torch.get_num_threads(),
            Path(folder),
        )
        engine: Engine = ENGINES[ENGINE](task)
        limit = gflops_without_zeros(linears, batch * model.shape.sequence, rounds)
        times = measure.turns_ms({ENGINE: engine.turn}, rounds, "calls")[ENGINE]
        shares = sampled(engine.turn, seconds)
    return {
        "density": density,
        "batch": batch,
        "ms": asdict(times),
        **rates(times.median, shares, 2e-9 * nonzeros * batch * model.shape.sequence, limit),
    }


def rates(
    milliseconds: float, functions: Mapping[tuple[str, str], float], gflop: float, limit: float
) -> dict[str, Any]:
    """What products reach of a limit, in GFLOP/s, and a call in which they reached all of it.

    Raises:
        RuntimeError: no sample fell into a product: the library has no names of functions.
    """
    shares: dict[str, float] = defaultdict(float)
    for (library, function), share in functions.items():
        shares[kind(library, function)] += share
    if not shares["products"]:
        raise RuntimeError(
            f"none of {len(functions)} functions is a product of the native library. It was "
            "stripped of its symbols: install mvpfx again from its sources, and do not strip it"
        )
    reached = gflop / (1e-3 * milliseconds * shares["products"])
    listed = {f"{lib}: {name}": share for (lib, name), share in functions.items() if share > SHOWN}
    return {
        "shares": {what: round(share, 4) for what, share in shares.items()},
        "products_gflops": round(reached, 1),
        "gflops_without_zeros": round(limit, 1),
        "ms_at_that_rate": round(milliseconds * (1 - shares["products"]) + 1e3 * gflop / limit, 1),
        "functions": {name: round(share, 4) for name, share in listed.items()},
    }


def main() -> None:
    """Measure all, and write `results/inference_profile/<processor>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--density", type=float, nargs="+", default=[0.2, 0.1, 0.05, 0.03])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--seconds", type=int, default=20, help="of samples a row (default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for batch, density in product(options.batch, options.density):
        rows.append(profile(density, batch, options.seconds, options.rounds))
        print(*(f"{name} {value}" for name, value in rows[-1].items() if name != "functions"))
    result = {
        "benchmark": "inference_profile",
        "question": "Where does the time of a converted model go?",
        "environment": results_file.environment(torch.device("cpu")),
        "kernels": isa(),
        "model": MODEL,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "rows": rows,
    }
    results_file.write(FOLDER / f"{results_file.processor_kind()}.json", result)


def table(results: list[dict[str, Any]]) -> str:
    """A table in Markdown for each kind of processor."""
    return results_file.parts(_table, results)


def _table(result: dict[str, Any]) -> str:
    kinds = dict.fromkeys([*KINDS.values(), OTHER, REST])
    rows = [
        {
            "batch": str(row["batch"]),
            "density": f"{row['density']:g}",
            "ms": f"{row['ms']['median']:.1f}",
            **{what: f"{row['shares'].get(what, 0):.1%}" for what in kinds},
            "products, GFLOP/s": f"{row['products_gflops']:.1f}",
            "without zeros": f"{row['gflops_without_zeros']:.1f}",
            "ms at that rate": f"{row['ms_at_that_rate']:.1f}",
        }
        for row in result["rows"]
    ]
    environment = result["environment"]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return (
        f"{text}\n\n{FOR_PEOPLE[result['model']]}, single weights, fp32, on "
        f"{environment['processor']} ({result['kernels']}), {environment['threads']} thread, torch "
        f"{environment['torch']}; medians of {result['rounds']} rounds, shares of "
        f"{result['seconds']} s of samples."
    )


if __name__ == "__main__":
    main()
