"""Below which density is sparse storage faster than dense?

Times `F.linear` against `SparseLinear`, token-major in and out, so both transposes count, going
through several copies of a weight as a model does through its layers. For each storage and token
count the break-even density is where the sparse time crosses `MARGIN` of the dense one,
interpolated between measured densities; the smallest of all shapes of a size class counts, rounded
down to a hundredth. `mvpfx/cost.py` holds the resulting table, and a test holds the two equal.

    python -m benchmarks.break_even
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

from benchmarks.results_file import FOLDER, environment
from mvpfx.cost import MARGIN, Quartiles, measure_storages, size_class
from mvpfx.kernels.library import isa, use_isa

RESULTS = FOLDER / "break_even"
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768))
TOKENS = (1, 16, 128, 1024)
DENSITIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
STORAGES = {"csr": 1, "bsr": 16, "native-avx512": 1, "native-avx2": 1, "native-plain": 1}
"""Storage -> block size; native kernels on each instruction set that the processor has."""


def main() -> None:
    """Measure, and write `results/break_even/<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default: 11)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    best = isa()
    storages = {"csr": 1} if device.type != "cpu" else dict(STORAGES)
    storages = {name: block for name, block in storages.items() if available(name)}
    if best is not None:
        use_isa(best)
    cases = list(product(storages, TOKENS, SHAPES, DENSITIES))
    points = [
        measure(storage, storages[storage], tokens, shape, density, device, options.rounds)
        for storage, tokens, shape, density in tqdm(cases, unit="case")
    ]
    result = {
        "question": "Below which density is sparse storage faster than dense?",
        "environment": environment(device),
        "dtype": "float32",
        "margin": MARGIN,
        "rounds": options.rounds,
        "table": {device.type: table(points)},
        "points": points,
    }
    path = RESULTS / f"{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compact(result) + "\n", encoding="utf-8")


def available(storage: str) -> bool:
    """Whether a storage can be measured here; native kernels are set to its instructions."""
    kind, _, instructions = storage.partition("-")
    if kind != "native":
        return True
    try:
        use_isa(instructions)
    except ValueError:
        return False
    return True


def compact(result: dict[str, Any]) -> str:
    """JSON text with each innermost list or object on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found.group().split()), text)


def measure(
    storage: str,
    block: int,
    tokens: int,
    shape: tuple[int, int],
    density: float,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Time one case; returns medians with lower and upper quartiles, in milliseconds."""
    weight = random_weight(shape, density, block).to(device)
    bias = torch.zeros(shape[0], device=device)
    kind, best = storage.partition("-")[0], isa()
    available(storage)
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
