"""Does latency follow what hybrid pruning left? BERT-base's shape with random structured zeros.

    python -m benchmarks.hybrid_latency

Measured against a bound: the dense model's time outside its encoder linears, plus its time in them
times the linear density of the converted model, counted on the weights that it really stores. Time
in the linears is that of the dense model's own linears, called alone, one after the other, on
inputs of the same shapes. Dense model, its linears, converted models and theirs take turns.

The zeros are those of hybrid pruning (nn_pruning): 32 x 32 blocks in the attention, whole hidden
units in the FFN. At density `v` of both, sqrt(v) of all heads stay, drawn over all layers together,
so that layers differ, and in the matrices of heads that stay sqrt(v) of the blocks. Published
models are like that: of 144 heads 89 stayed at a linear density of 0.27, 64 at 0.26, 81 at 0.15.
An FFN keeps between half and one and a half times `v` of its hidden units, which makes odd widths:
a unit that goes takes its row, its column, not its bias. Blocks that went inside of heads that
stay are no structure that could go: a weight keeps them as zeros, or is stored as BSR.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from benchmarks import measure, results_file, structured_table
from mvpfx.storage import SparseLinear

DENSITIES = (0.5, 0.25, 0.125)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Of the encoder, its input and its blocks; the defaults are BERT-base's."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    ffn: int = 3072
    vocabulary: int = 30522
    sequence: int = 128
    block: int = 32

    def config(self) -> dict[str, Any]:
        """The sizes under the names that configurations of transformers have for them."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.sequence,
        }


def dense_bert(shape: Shape, seed: int = 0) -> nn.Module:
    """A classifier with random weights, biases among them, in eval mode."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**shape.config())).eval()
    with torch.no_grad():
        for module in model.bert.encoder.modules():
            if isinstance(module, nn.Linear):
                module.bias.normal_(0, 0.3)
    return model


def hybrid(dense: nn.Module, shape: Shape, density: float, seed: int = 0) -> nn.Module:
    """A copy of the dense model with the zeros of hybrid pruning at `density`."""
    model: Any = copy.deepcopy(dense)
    random = torch.Generator().manual_seed(seed)
    share, width = math.sqrt(density), shape.hidden // shape.heads
    block = (shape.block, shape.block)
    kept_heads = drawn((shape.layers, shape.heads), share, random)
    spread = torch.linspace(0.5, 1.5, shape.layers)[torch.randperm(shape.layers, generator=random)]
    with torch.no_grad():
        for layer, heads, factor in zip(model.bert.encoder.layer, kept_heads, spread, strict=True):
            rows = heads.repeat_interleave(width)
            attention = layer.attention.self
            for linear in (attention.query, attention.key, attention.value):
                linear.weight[rows] *= blocks(linear.weight[rows], block, share, random)
                linear.weight[~rows] = 0
            out = layer.attention.output.dense.weight
            out[:, rows] *= blocks(out[:, rows], block, share, random)
            out[:, ~rows] = 0
            units = drawn((shape.ffn,), min(1.0, density * float(factor)), random)
            layer.intermediate.dense.weight[~units] = 0
            layer.output.dense.weight[:, ~units] = 0
    return model


def drawn(size: tuple[int, ...], share: float, random: torch.Generator) -> Tensor:
    """A mask of `size` with `share` of it kept, exactly but for rounding."""
    count = math.prod(size)
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=random)[: round(share * count)]] = True
    return kept.view(size)


def blocks(weight: Tensor, block: tuple[int, int], share: float, random: torch.Generator) -> Tensor:
    """A mask of a weight's shape with `share` of its blocks kept, each `block` rows by columns."""
    rows, columns = block
    grid = drawn((weight.shape[0] // rows, weight.shape[1] // columns), share, random)
    return grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def linears(model: nn.Module) -> dict[str, nn.Linear | SparseLinear]:
    """The encoder's linear layers, in the order of their calls, however they are stored."""
    return {
        name: module
        for name, module in model.named_modules()
        if ".layer." in name and isinstance(module, (nn.Linear, SparseLinear))
    }


def stored(model: nn.Module, nonzero: bool = False) -> int:
    """Values that the weights of the encoder's linears hold; with `nonzero` less their zeros."""
    weights = [
        layer.values if isinstance(layer, SparseLinear) else layer.weight
        for layer in linears(model).values()
    ]
    return sum(int(torch.count_nonzero(w)) if nonzero else w.numel() for w in weights)


class LinearsAlone(nn.Module):
    """Calls the encoder's linears one after the other, each on states of its width."""

    def __init__(self, model: nn.Module, batch: int, sequence: int) -> None:
        super().__init__()
        layers = list(linears(model).values())
        dtype = next(model.parameters()).dtype
        states = {n: torch.randn(batch, sequence, n).to(dtype) for n in widths(layers)}
        self.linears = nn.ModuleList(layers)
        self.states = [states[layer.in_features] for layer in layers]

    def forward(self, **_: Tensor) -> None:
        """Take what the model takes, and leave it."""
        for layer, states in zip(self.linears, self.states, strict=True):
            layer(states)


def widths(layers: Sequence[nn.Linear | SparseLinear]) -> set[int]:
    """How many features some layers take."""
    return {layer.in_features for layer in layers}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    shape: Shape
    densities: Sequence[float] = DENSITIES
    rounds: int = 30
    multiple_of: int = 1


def case(settings: Settings, dtype: str, batch: int) -> dict[str, Any]:
    """One dtype and batch size: dense, its linears, and both of each density, in turn."""
    shape = settings.shape
    dense = dense_bert(shape).to(DTYPES[dtype])
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (batch, shape.sequence), generator=random)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    smaller: dict[str, nn.Module] = {}
    found: list[dict[str, Any]] = []
    for density in settings.densities:
        masked = hybrid(dense, shape, density)
        small = mvpfx.convert(masked, example_inputs=inputs, multiple_of=settings.multiple_of)
        smaller[f"{density:g}"] = small
        found.append({"density": density, **left(dense, masked, small)})
    models = {"dense": dense, **smaller}
    alone = {f"{n}, linears": LinearsAlone(m, batch, shape.sequence) for n, m in models.items()}
    label = f"{dtype}, batch {batch}"
    times = measure.interleaved_ms({**models, **alone}, inputs, settings.rounds, label)
    for name, row in zip(smaller, found, strict=True):
        row |= against_bound(times, name, row["linear_density_stored"])
    return {
        "dtype": dtype,
        "batch": batch,
        "dense_ms": asdict(times["dense"]),
        "dense_linears_ms": asdict(times["dense, linears"]),
        "converted": found,
    }


def left(dense: nn.Module, masked: nn.Module, small: nn.Module) -> dict[str, Any]:
    """What a conversion left of the encoder."""
    report, layers = mvpfx.report_of(small), linears(small)
    rows = [row for row in report.rows if row.site.removesuffix(".weight") in layers]
    return {
        "linear_density_nonzero": stored(masked, nonzero=True) / stored(dense),
        "linear_density_stored": stored(small) / stored(dense),
        "storages": dict(Counter(row.storage for row in rows)),
        "attention_widths": [m.out_features for n, m in layers.items() if n.endswith(".query")],
        "ffn_widths": [m.out_features for n, m in layers.items() if ".intermediate." in n],
        "largest_output_difference": report.max_difference,
    }


def against_bound(times: dict[str, measure.Quartiles], name: str, density: float) -> dict[str, Any]:
    """Latency of a converted model, and of what bounds it, milliseconds."""
    inside = times["dense, linears"].median
    bound = times["dense"].median - inside + density * inside
    return {
        "latency_ms": asdict(times[name]),
        "linears_ms": asdict(times[f"{name}, linears"]),
        "faster": times["dense"].median / times[name].median,
        "bound_ms": bound,
        "latency_over_bound": times[name].median / bound,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hybrid_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="1, or several: 1 16")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--multiple-of", type=int, default=1, help="as in mvpfx.convert")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=1)
    output = results_file.FOLDER / f"hybrid_latency_{results_file.processor_kind()}.json"
    parser.add_argument("--output", type=Path, default=output, help="default: by processor")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shape = Shape(**{size.name: getattr(options, size.name) for size in fields(Shape)})
    settings = Settings(shape, options.density, options.rounds, options.multiple_of)
    cases = [case(settings, dtype, batch) for dtype in options.dtype for batch in options.batch]
    result = {
        "benchmark": "hybrid_latency",
        "environment": results_file.environment(torch.device("cpu")),
        "settings": asdict(settings),
        "cases": cases,
    }
    results_file.write(options.output, result)
    print(structured_table.latency([result]))


if __name__ == "__main__":
    main()
