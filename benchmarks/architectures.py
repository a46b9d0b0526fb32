"""How much faster do models of many architectures become with the same density?

    python -m benchmarks.architectures

Their base sizes with 6 layers and random weights; of the linears in the repeated blocks 10 % are
kept at random. float32, one input of 128 tokens (CLIP's text 77, ViT's picture 197), one thread;
dense torch and what `mvpfx.convert` returns take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate
from torch import nn

import mvpfx
from benchmarks import results_file
from mvpfx.comparison import output_difference
from mvpfx.cost import compare

BEGIN = "<!-- architectures: made by python -m benchmarks.readme -->"
END = "<!-- end of architectures -->"
FOLDER = results_file.FOLDER / "architectures"
DENSITY, LAYERS, TOKENS = 0.1, 6, 128
DECODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8000,
    "use_cache": False,
}

DEBERTA: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
}
FEW: dict[str, Any] = {"num_hidden_layers": LAYERS}
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**FEW)),
    "RoBERTa": lambda: hf.RobertaModel(hf.RobertaConfig(**FEW)),
    "ModernBERT": lambda: hf.ModernBertModel(hf.ModernBertConfig(**FEW)),
    "DeBERTa-v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**DEBERTA)),
    "GPT-2": lambda: hf.GPT2Model(hf.GPT2Config(n_layer=LAYERS, use_cache=False)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
    "Qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER)),
    "Gemma 3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**DECODER)),
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**FEW)),
    "CLIP, text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**FEW)),
}


def sparse(build: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, with random zeros in the linears of its repeated blocks."""
    torch.manual_seed(0)
    model = build().eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            repeated = any(part.isdigit() for part in name.split("."))
            weight = getattr(module, "weight", None)
            if repeated and isinstance(weight, nn.Parameter) and weight.dim() == 2:
                weight *= torch.rand(weight.shape, generator=random) < DENSITY
    return model


def example(model: nn.Module) -> dict[str, Any]:
    """One input of the model."""
    config: Any = model.config
    random = torch.Generator().manual_seed(0)
    if config.model_type == "vit":
        size = config.image_size
        return {"pixel_values": torch.randn(1, 3, size, size, generator=random)}
    length = min(TOKENS, config.max_position_embeddings)
    ids = torch.randint(3, config.vocab_size, (1, length), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(build: Callable[[], nn.Module], rounds: int) -> dict[str, Any]:
    """Milliseconds of a call, dense and converted, and how far the outputs are apart."""
    model = sparse(build)
    inputs = example(model)
    with torch.no_grad():
        small = mvpfx.convert(model, example_inputs=inputs)
        difference, largest = output_difference(model(**inputs), small(**inputs))
        times = compare(
            {"torch": lambda: model(**inputs), "mvpfx": lambda: small(**inputs)}, rounds=rounds
        )
    return {
        "faster": round(times["torch"].median_ms / times["mvpfx"].median_ms, 2),
        "largest_difference": difference,
        "largest_output": largest,
        "ms": {name: asdict(time) for name, time in times.items()},
    }


def main() -> None:
    """Measure all, and write `results/architectures/<processor>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds (default: 21)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, build in ARCHITECTURES.items():
        rows.append({"architecture": name, **measure(build, options.rounds)})
        print(name, rows[-1]["faster"], flush=True)
    result = {
        "benchmark": "architectures",
        "question": "How much faster do models of many architectures become?",
        "environment": results_file.environment(torch.device("cpu")),
        "settings": {"density": DENSITY, "layers": LAYERS, "tokens": TOKENS},
        "rounds": options.rounds,
        "rows": rows,
    }
    results_file.write(FOLDER / f"{results_file.processor_kind()}.json", result)


def table(results: list[dict[str, Any]]) -> str:
    """A table in Markdown for each kind of processor."""
    return results_file.parts(_table, results)


def _table(result: dict[str, Any]) -> str:
    rows = [
        {
            "architecture": row["architecture"],
            "torch, ms": f"{row['ms']['torch']['median_ms']:.1f}",
            "mvpfx, ms": f"{row['ms']['mvpfx']['median_ms']:.1f}",
            "faster": f"{row['faster']:.2f}x",
            "largest difference": f"{row['largest_difference']:.0e}",
        }
        for row in result["rows"]
    ]
    environment = result["environment"]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return (
        f"{text}\n\nOn {environment['processor']} ({environment['instructions']}), "
        f"torch {environment['torch']}, transformers {environment['transformers']}, medians of "
        f"{result['rounds']} interleaved rounds."
    )


if __name__ == "__main__":
    main()
