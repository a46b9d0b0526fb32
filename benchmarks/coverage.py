"""What capturing covers: every model of the zoo against `W *= mask`, and what was found in it.

    python -m benchmarks.coverage --output benchmarks/results/coverage.json

Each model runs in four shapes, in training and in eval mode, with every weight that feeds a matmul
masked at random; its regions, their misses and its sites are counted. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results_file
from tests.zoo import GROUPS
from tests.zoo.check import RELATIVE, Outcome, check
from tests.zoo.entry import SHAPES, Entry


def result_of(entry: Entry, group: str, outcome: Outcome) -> dict[str, Any]:
    """One model as it goes into the file."""
    parts = {**outcome.blocks, **outcome.regions}
    return {
        "name": entry.name,
        "group": group,
        "class": outcome.model,
        "kind": entry.kind,
        "shapes": len(outcome.differences),
        "shapes_equal": outcome.equal_shapes,
        "largest_relative_difference": outcome.largest,
        "blocks": captured(outcome.blocks),
        "regions": captured(parts),
        "misses": {name: reasons for name, reasons in parts.items() if reasons},
        "sites": {
            "found": len(outcome.expected & outcome.sites),
            "expected": len(outcome.expected - set(entry.misses)),
        },
        "documented": entry.misses,
        "undocumented": sorted(outcome.missed - set(entry.misses)),
    }


def captured(regions: dict[str, list[str]]) -> dict[str, int]:
    """How many regions there are, and of how many every call ran as a graph."""
    return {"captured": sum(not reasons for reasons in regions.values()), "total": len(regions)}


def totals(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the models; blocks are those of transformers models."""
    blocks = [model["blocks"] for model in models if model["kind"] == "hf"]
    return {
        "models": len(models),
        "shapes": sum(model["shapes"] for model in models),
        "shapes_equal": sum(model["shapes_equal"] for model in models),
        "blocks": {key: sum(b[key] for b in blocks) for key in ("captured", "total")},
        "regions": {
            key: sum(model["regions"][key] for model in models) for key in ("captured", "total")
        },
        "sites": {key: sum(m["sites"][key] for m in models) for key in ("found", "expected")},
    }


def run(groups: dict[str, tuple[Entry, ...]], shapes: int) -> dict[str, Any]:
    """Check the models of `groups` in the first so many shapes."""
    pairs = [(group, entry) for group, entries in groups.items() for entry in entries]
    models: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that miss optional kernels
        for group, entry in tqdm(pairs, desc="coverage", mininterval=1.0):
            models.append(result_of(entry, group, check(entry, tuple(range(shapes)))))
    return {
        "benchmark": "coverage",
        "environment": results_file.environment(torch.device("cpu")),
        "equal_within": RELATIVE,
        "totals": totals(models),
        "models": models,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of models; all of them if none"
    )
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many shapes")
    parser.add_argument("--output", type=Path, help="where to write the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check the zoo and write what it gave."""
    options = parse(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = {
        group: tuple(e for e in entries if not options.only or e.name in options.only)
        for group, entries in GROUPS.items()
    }
    result = run(chosen, options.shapes)
    if options.output:
        results_file.write(options.output, result)
    for name, value in result["totals"].items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
