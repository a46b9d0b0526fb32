"""Below which density is sparse storage faster than dense?

Times `F.linear` against `SparseLinear`, token-major in and out, so both transposes count, going
through several copies of a weight as a model does through its layers. For each storage and token
count the break-even density is where the sparse time crosses `MARGIN` of the dense one,
interpolated between measured densities; the smallest of all shapes of a size class counts, rounded
down to a hundredth. `mvpfx/break_even.py` holds the resulting tables, and a test holds them equal.

    python -m benchmarks.break_even --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
import re
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results_file import FOLDER, KEPT_TO, environment, instructions
from mvpfx.break_even import size_class, storage_key
from mvpfx.cost import MARGIN, Quartiles, measure_storages
from mvpfx.kernels.library import INSTRUCTIONS, isa, use_isa

RESULTS = FOLDER / "break_even"
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768))
TOKENS = (1, 16, 128, 1024)
DENSITIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
BLOCKS = {"csr": 1, "bsr": 16, "native": 1}
"""Storage -> block size."""


def main() -> None:
    """Measure, and write `results/break_even/<processor>-<dtype>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default: 11)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in options.dtype:
        run(dtype, options.rounds)


def run(dtype: str, rounds: int) -> None:
    """Measure one dtype."""
    cases = list(product(storages(getattr(torch, dtype)), TOKENS, SHAPES, DENSITIES))
    points = [
        measure(storage, tokens, shape, density, getattr(torch, dtype), rounds)
        for storage, tokens, shape, density in tqdm(cases, unit="case")
    ]
    result = {
        "question": "Below which density is sparse storage faster than dense?",
        "environment": environment(torch.device("cpu")),
        "dtype": dtype,
        "margin": MARGIN,
        "rounds": rounds,
        "table": {instructions(): table(points)},
        "points": points,
    }
    path = RESULTS / f"{instructions()}-{dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compact(result) + "\n", encoding="utf-8")


def storages(dtype: torch.dtype) -> list[str]:
    """Those that can be measured here; native kernels on each instruction set once.

    What `torch.sparse` makes of AVX2 differs from maker to maker, so one of them cannot stand for
    all, as it can with kernels of our own.
    """
    best, native = isa(), dict[str, None]()
    allowed = INSTRUCTIONS[INSTRUCTIONS.index(instructions()) :]
    for name in allowed if best is not None else ():
        if available(name):
            native[storage_key("native", dtype)] = None
    if best is not None:
        use_isa(best)
    return [*native] if KEPT_TO else ["csr", "bsr", *native]


def available(name: str) -> bool:
    """Whether native kernels have an instruction set here, which they are then set to."""
    try:
        use_isa(name)
    except ValueError:
        return False
    return True


def compact(result: dict[str, Any]) -> str:
    """JSON text with each innermost list or object on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found.group().split()), text)


def measure(
    storage: str,
    tokens: int,
    shape: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, Any]:
    """Time one case; returns medians with lower and upper quartiles, in milliseconds."""
    (kind, _, name), best = storage.partition("-"), isa()
    block = BLOCKS[kind]
    weight = random_weight(shape, density, block).to(dtype)
    bias = torch.zeros(shape[0], dtype=dtype)
    if name:
        use_isa(name)
    times = measure_storages(weight, bias, tokens, {kind: block}, rounds)
    if best is not None:
        use_isa(best)
    return {
        "storage": storage,
        "block": block,
        "tokens": tokens,
        "shape": f"{shape[0]} x {shape[1]}",
        "density": density,
        **_listed("dense", times["dense"]),
        **_listed("sparse", times[kind]),
    }


def random_weight(shape: tuple[int, int], density: float, block: int) -> Tensor:
    """A weight whose `block` x `block` blocks are kept at random."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(shape[0] // block, shape[1] // block, generator=generator)
    count = round(density * grid.numel())
    kept = torch.zeros(grid.numel(), dtype=torch.bool)
    kept[grid.flatten().argsort()[:count]] = True
    mask = kept.view_as(grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(shape, generator=generator) * mask


def table(points: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Storage -> size of the weight -> tokens (as text, for JSON) -> break-even density."""
    curves: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for point in points:
        rows, columns = map(int, point["shape"].split(" x "))
        key = (point["storage"], size_class(rows * columns), str(point["tokens"]), point["shape"])
        ratio = point["sparse_low_ms"] / point["dense_low_ms"]
        curves.setdefault(key, []).append((point["density"], ratio))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (storage, size, tokens, _), curve in curves.items():
        row = found.setdefault(storage, {}).setdefault(size, {})
        limit = math.floor(crossing(curve) * 100) / 100
        row[tokens] = min(row.get(tokens, 1.0), limit)
    return found


def crossing(curve: list[tuple[float, float]]) -> float:
    """The density at which the ratio first reaches `MARGIN`, going up; 0.0 where it starts there.

    >>> round(crossing([(0.1, 0.75), (0.2, 1.15)]), 3)
    0.15
    """
    (lowest, first), *_ = curve
    if first >= MARGIN:
        return 0.0
    for (d0, r0), (d1, r1) in pairwise(curve):
        if r1 >= MARGIN:
            return d0 + (d1 - d0) * (MARGIN - r0) / (r1 - r0)
    return max(lowest, curve[-1][0])


def _listed(name: str, times: Quartiles) -> dict[str, Any]:
    return {
        f"{name}_ms": round(times.median_ms, 4),
        f"{name}_low_ms": round(times.low_ms, 4),
        f"{name}_high_ms": round(times.high_ms, 4),
    }


if __name__ == "__main__":
    main()
