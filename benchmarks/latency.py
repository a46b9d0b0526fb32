"""How latency follows what was pruned: an encoder cut by magnitude, without any training.

    python -m benchmarks.latency --model FOLDER --threads 1 --output benchmarks/results/latency.json

Each converted model takes turns with the dense one, at batch 1 and 16 of sequence length 128. What
the cut does to accuracy is not the question here; `fine_prune` answers that.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import mvpfx
from benchmarks import measure, presets, results_file

CASES = (("element", 0.10), ("element", 0.05), ("element", 0.50), ("structured", 0.25))
BATCHES = (1, 16)
LENGTH = 128


def load(folder: Path) -> nn.Module:
    """The encoder with a fresh classification head, in eval mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    kind: Any = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder).eval()


def parameters(model: nn.Module) -> int:
    """All parameters, each counted once; of a sparse weight the values that are stored."""
    return sum(p.numel() for p in model.parameters())


def linear_parameters(model: nn.Module) -> int:
    """Values held by the weights of the encoder's linear layers, those of removed units gone."""
    encoder = (p for name, p in model.named_parameters() if ".layer." in name)
    return sum(p.numel() for p in encoder if p.dim() >= 2)


def case(dense: nn.Module, granularity: str, density: float, batch: int, rounds: int) -> Any:
    """Latency and parameters of one cut at one batch size."""
    model = copy.deepcopy(dense)
    config = presets.pruning_config(
        model, density=density, granularity=granularity, criterion="magnitude", constant=True
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    small = mvpfx.convert(mvpfx.prepare(model, config), example_inputs=inputs)
    label = f"{granularity} {density:g}, batch {batch}"
    times = measure.interleaved_ms({"dense": dense, "converted": small}, inputs, rounds, label)
    ratio = times["converted"].median / times["dense"].median
    result = {
        "granularity": granularity,
        "density": density,
        "batch": batch,
        "latency_ms": {name: asdict(quartiles) for name, quartiles in times.items()},
        "latency_ratio": ratio,
        "largest_output_difference": mvpfx.report_of(small).max_difference,
        "parameters": {
            name: sum(p.numel() for p in m.parameters())
            for name, m in (("dense", dense), ("converted", small))
        },
    }
    if granularity == "structured":
        left = linear_parameters(small) / linear_parameters(dense)
        result |= {"linear_parameters_ratio": left, "latency_over_linear_parameters": ratio / left}
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="where to write the result, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = load(options.model)
    cases = [
        case(dense, granularity, density, batch, options.rounds if batch == 1 else 10)
        for batch in BATCHES
        for granularity, density in CASES
    ]
    environment = results_file.environment(torch.device("cpu"))
    result = {"benchmark": "latency", "sequence": LENGTH, "environment": environment}
    shown = ("granularity", "density", "batch", "latency_ratio", "latency_over_linear_parameters")
    print(tabulate([{key: c.get(key) for key in shown} for c in cases], headers="keys"))
    if options.output:
        results_file.write(options.output, {**result, "cases": cases})


if __name__ == "__main__":
    main()
