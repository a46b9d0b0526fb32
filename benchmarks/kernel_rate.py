"""How near does one sparse product come to the FLOP rate of the dense one?

    python -m benchmarks.kernel_rate

Weights of BERT-base's shapes with random zeros, activations of 128 and 1,024 tokens, one thread,
float32: `F.linear`, the native kernel alone on activations in tiles, and the same with their way in
and out (entering, leaving), which a chain has only at its ends. The rate is that of the
multiplications and additions of nonzeros, over that of the dense op in the same run; 4 weights of a
shape take turns, as the layers of a model do.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import results_file
from mvpfx.cost import Quartiles, compare
from mvpfx.kernels.chain import Chain
from mvpfx.kernels.library import isa
from mvpfx.kernels.step import Part, Place, Step
from mvpfx.storage import SparseLinear

SHAPES = ((768, 768), (3072, 768), (768, 3072))
TOKENS = (128, 1024)
DENSITIES = (0.2, 0.1, 0.05, 0.03)
COPIES = 4
FOLDER = results_file.FOLDER / "kernel_rate"


def measure(
    shape: tuple[int, int], tokens: int, density: float, rounds: int
) -> dict[str, Quartiles]:
    """Milliseconds of one product: dense, by the native layer, and by the kernel alone."""
    rows, columns = shape
    random = torch.Generator().manual_seed(0)
    kept = torch.rand(COPIES, rows, columns, generator=random) < density
    weights = torch.randn(COPIES, rows, columns, generator=random)
    bias, x = torch.zeros(rows), torch.randn(tokens, columns, generator=random)
    layers = [
        SparseLinear.from_dense(weight * mask, bias, output_layout="tiled")
        for weight, mask in zip(weights, kept, strict=True)
    ]
    products = [(multiplying(rows, columns), layer) for layer in layers]
    (tiles,) = entering(columns)(x)
    calls = {
        "dense": lambda: [F.linear(x, weight, bias) for weight in weights],
        "layer": lambda: [layer(x) for layer in layers],
        "kernel": lambda: [product(tiles, layer) for product, layer in products],
    }
    times = compare(calls, rounds=rounds)
    return {
        name: Quartiles(t.median_ms / COPIES, t.low_ms / COPIES, t.high_ms / COPIES)
        for name, t in times.items()
    }


def entering(columns: int) -> Chain:
    """What takes activations `[tokens, columns]` into tiles."""
    step = Step("enter", None, Part(0, 0, columns), (0,))
    return Chain([step], [Place(columns, slot=0)], [0])


def multiplying(rows: int, columns: int) -> Chain:
    """What multiplies such tiles by a layer of `rows` outputs."""
    step = Step("multiply", Part(0, 0, columns), Part(1, 0, rows), (1,))
    return Chain([step], [Place(columns, argument=0), Place(rows, slot=1)], [1])


def main() -> None:
    """Measure all, and write `results/kernel_rate/<processor>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (default: 21)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for shape, tokens, density in itertools.product(SHAPES, TOKENS, DENSITIES):
        with torch.no_grad():
            times = measure(shape, tokens, density, options.rounds)
        dense = times["dense"].median_ms
        row = {
            "shape": f"{shape[0]} x {shape[1]}",
            "tokens": tokens,
            "density": density,
            "dense_gflops": round(2e-6 * shape[0] * shape[1] * tokens / dense, 1),
            "speed_up": round(dense / times["kernel"].median_ms, 2),
            "speed_up_layer": round(dense / times["layer"].median_ms, 2),
            "share_of_dense_rate": round(density * dense / times["kernel"].median_ms, 3),
            "ms": {name: asdict(t) for name, t in times.items()},
        }
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items() if name != "ms"), flush=True)
    result = {
        "benchmark": "kernel_rate",
        "question": "How near does one sparse product come to the FLOP rate of the dense one?",
        "environment": results_file.environment(torch.device("cpu")),
        "kernels": isa(),
        "rounds": options.rounds,
        "rows": rows,
    }
    results_file.write(FOLDER / f"{results_file.processor_kind()}.json", result)


if __name__ == "__main__":
    main()
