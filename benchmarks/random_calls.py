"""Random calls of every model of the zoo: prepared against `W *= mask`, converted against masked.

    python -m benchmarks.random_calls --calls 30 --output benchmarks/results/random_calls.json

Each call draws its shape, padding, outputs, cache, dtype, gradient mode, hooks and copies; what is
drawn follows from the seed. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results_file
from tests import random_calls
from tests.zoo import ZOO


def result_of(name: str, granularity: str, way: str, seed: int, calls: int) -> dict[str, Any]:
    """One model in one way, as it goes into the file."""
    row: dict[str, Any] = {"name": name, "granularity": granularity, "way": way}
    try:
        tally = random_calls.check(ZOO[name], granularity, way, seed, calls)
    except random_calls.NotApplicableError as reason:
        return {**row, "calls": 0, "refused": 0, "not_prepared": str(reason)}
    except Exception as error:  # noqa: BLE001  a fault of the model in hand, the others go on
        message = f"{type(error).__name__}: {error}"
        return {**row, "calls": 0, "refused": 0, "wrong": [], "raised": [message]}
    counts = {"calls": tally.calls, "refused": tally.refused}
    return {**row, **counts, "wrong": tally.wrong, "raised": tally.raised}


def totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Sums by way over all models and granularities."""
    found: dict[str, dict[str, int]] = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        ours = [row for row in rows if row["way"] == way and "not_prepared" not in row]
        found[way] = {
            "models": len({row["name"] for row in ours}),
            "calls": sum(row["calls"] for row in ours),
            "not compared, since the reference raises": sum(row["refused"] for row in ours),
            "wrong results": sum(len(row["wrong"]) for row in ours),
            "exceptions of the tested model alone": sum(len(row["raised"]) for row in ours),
        }
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_calls", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(ZOO), help="names of models")
    parser.add_argument("--calls", type=int, default=30, help="of each model in each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="*", default=list(random_calls.WAYS))
    parser.add_argument("--granularities", nargs="*", default=list(random_calls.GRANULARITIES))
    parser.add_argument("--output", type=Path, help="where to write the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Call the zoo at random and write what it gave."""
    options = parse(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = [(n, g, w) for n in options.only for g in options.granularities for w in options.ways]
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that miss optional kernels
        for cell in tqdm(cells, desc="random calls", mininterval=1.0):
            rows.append(result_of(*cell, options.seed, options.calls))
            for kind in ("wrong", "raised"):
                for fault in rows[-1].get(kind, []):
                    tqdm.write(f"{' '.join(cell)}: {kind}: {fault}", file=sys.stdout)
    result: dict[str, Any] = {
        "benchmark": "random_calls",
        "environment": results_file.environment(torch.device("cpu")),
        "seed": options.seed,
        "calls_each": options.calls,
        "totals": totals(rows),
        "rows": rows,
    }
    if options.output:
        results_file.write(options.output, result)
    print(f"seed {options.seed}, {options.calls} calls of each model in each way")
    for way, counts in result["totals"].items():
        print(f"{way}: " + ", ".join(f"{name} {value}" for name, value in counts.items()))


if __name__ == "__main__":
    main()
