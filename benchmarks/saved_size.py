"""How small a converted model is on disk, and how fast it loads.

    python -m benchmarks.saved_size

BERT-base's shape with random weights, 3 % of the encoder's linear layers kept at random: the size
does not depend on which ones. Beside it the same zeros stored densely and compressed by gzip.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mvpfx
from benchmarks import results_file
from mvpfx.packing import VALUES
from mvpfx.store import TENSORS

DENSITY = 0.03
AUTHORS_MB = 11.0
"""The encoder at 3 %, as the authors store it (Sanh et al. 2020)."""
_LOAD = (
    "import sys, time, torch, mvpfx, transformers\n"
    "transformers.BertForSequenceClassification\n"
    "start = time.perf_counter()\n"
    "mvpfx.load(sys.argv[1])\n"
    "print(time.perf_counter() - start)\n"
)


def pruned_bert(layers: int) -> nn.Module:
    """BERT-base with random zeros, converted."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for name, weight in model.bert.encoder.named_parameters():
            if weight.dim() == 2 and "LayerNorm" not in name:
                weight.mul_(torch.rand_like(weight) < DENSITY)
    batch = {"input_ids": torch.randint(0, 1000, (1, 8))}
    return mvpfx.convert(model, example_inputs=batch, lowering="dense")


def measure(layers: int = 12, loads: int = 5) -> dict[str, Any]:
    """Megabytes of each way to store the model, and seconds to load the exact one."""
    small = pruned_bert(layers)
    found: dict[str, Any] = {"density": DENSITY, "layers": layers, "authors_encoder_mb": AUTHORS_MB}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        save_file({n: t.contiguous() for n, t in small.state_dict().items()}, dense)
        found["dense_mb"] = megabytes(dense)
        found["dense_encoder_mb"] = encoder_bytes(dense) / 1e6
        zipped = Path(folder) / "dense.gz"
        zipped.write_bytes(gzip.compress(dense.read_bytes(), compresslevel=6))
        found["gzip_mb"] = megabytes(zipped)
        for values in VALUES:
            saved = mvpfx.save(small, Path(folder) / values, values=values)
            found[f"{values}_mb"] = megabytes(saved / TENSORS)
            found[f"{values}_encoder_mb"] = encoder_bytes(saved / TENSORS) / 1e6
        seconds = [float(load_seconds(Path(folder) / "exact")) for _ in range(loads)]
    lower, median, upper = statistics.quantiles(seconds, n=4)
    found["load_seconds"] = {"lower": lower, "median": median, "upper": upper}
    return found


def load_seconds(folder: Path) -> str:
    """Seconds that a fresh process takes to load a model."""
    command = [sys.executable, "-c", _LOAD, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def megabytes(path: Path) -> float:
    """Size of a file."""
    return path.stat().st_size / 1e6


def encoder_bytes(path: Path) -> int:
    """Bytes of the encoder's tensors in a safetensors file."""
    tensors = (tensor for name, tensor in load_file(path).items() if ".encoder." in name)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saved_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--output", type=Path, default=results_file.FOLDER / "saved_size.json")
    options = parser.parse_args(arguments)
    found = measure(options.layers)
    environment = results_file.environment(torch.device("cpu"))
    result = {"benchmark": "saved_size", "environment": environment, **found}
    results_file.write(options.output, result)
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
