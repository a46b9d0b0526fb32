"""The cells of `benchmarks.cpu_inference`, and the lines of its result file."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.hybrid_latency import DTYPES
from benchmarks.inference_models import DENSE, MODELS, PATTERNS

FOLDER = results_file.FOLDER / "cpu_inference"
RESULT = FOLDER / f"{results_file.processor_kind()}.jsonl"
"""Each kind of processor has a file of its own."""


@dataclass(frozen=True)
class Cell:
    """What a line of the result file is about.

    Attributes:
        model: a name in `inference_models.MODELS`.
        pattern: of the zeros; "dense" at density 1.
        block: rows x columns of the pattern "blocks", None for others.
        density: of the linears in the repeated blocks.
        batch: sequences.
        dtype: "fp32" or "bf16".
        threads: of each engine.
    """

    model: str
    pattern: str
    block: str | None
    density: float
    batch: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        block = f" {self.block}" if self.block else ""
        size = f"batch {self.batch}, {self.dtype}, {self.threads} thread(s)"
        return f"{self.model}, {self.pattern}{block}, density {self.density:g}, {size}"


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for, each once."""
    found = [
        Cell(
            model,
            DENSE if density == 1 else pattern,
            options.block if pattern == "blocks" and density != 1 else None,
            density,
            batch,
            dtype,
            threads,
        )
        for threads, dtype, model, pattern, batch, density in product(
            options.threads,
            options.dtype,
            options.model,
            options.pattern,
            options.batch,
            options.density,
        )
    ]
    return list(dict.fromkeys(found))


def results(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """The lines that count, by kind of processor."""
    return {path.stem: list(done(path).values()) for path in sorted(folder.glob("*.jsonl"))}


def done(path: Path) -> dict[Cell, dict[str, Any]]:
    """The last line of each cell in a result file."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Cell(**line["cell"]): line for line in lines}


def curves(lines: list[dict[str, Any]]) -> dict[Cell, dict[float, dict[str, Any]]]:
    """Lines that differ in their density only, by the cell at density 1, from dense to sparse.

    The dense model, which has no pattern, begins the curve of every pattern. Curves are in the
    order of models, dtypes, threads, patterns and batches, however the lines are.
    """
    found: dict[Cell, dict[float, dict[str, Any]]] = {}
    dense: dict[Cell, dict[str, Any]] = {}
    for line in lines:
        cell = Cell(**line["cell"])
        if cell.pattern == DENSE:
            dense[cell] = line
        else:
            found.setdefault(replace(cell, density=1.0), {})[cell.density] = line
    for start, curve in found.items():
        line = dense.get(replace(start, pattern=DENSE, block=None))
        if line is not None:
            curve[1.0] = line
    return {
        start: dict(sorted(found[start].items(), reverse=True))
        for start in sorted(found, key=_order)
    }


def _order(cell: Cell) -> tuple[Any, ...]:
    model, pattern = list(MODELS).index(cell.model), PATTERNS.index(cell.pattern)
    dtype = list(DTYPES).index(cell.dtype)
    return model, dtype, cell.threads, pattern, cell.block or "", cell.batch
