"""Of how many models does `convert` remove dead heads and dead hidden channels in full?

    python -m benchmarks.removal --output benchmarks/results/removal.json

Tiny models of transformers with random weights, causal and masked language models. In each layer
half of the heads are dead (what reads them is zero), or half of the channels that a feed-forward
layer reads; other ones in each layer. What `mvpfx.convert` leaves of these weights is counted.
Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import mvpfx
from benchmarks import results_file
from mvpfx.head_unit import head_unit

BEGIN = "<!-- removal: made by python -m benchmarks.readme -->"
END = "<!-- end of removal -->"
FOLDER = results_file.FOLDER / "removal"
INNER = 48
"""Hidden channels of a feed-forward layer: a number that nothing else has."""
SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 32,
    "input_embedding_size": 32, "output_embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "intermediate_size": INNER, "n_inner": INNER, "d_ff": INNER, "ffn_dim": INNER,
    "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "hidden_dim": INNER, "d_inner": INNER,
    "ffn_hidden_size": INNER, "moe_intermediate_size": INNER, "vocab_size": 99,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "type_vocab_size": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
}  # fmt: skip
"""Sizes by the names that configurations have for them."""
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
MASKED: dict[str, dict[str, Any]] = {
    "Albert": {}, "Bert": {}, "BigBird": {"attention_type": "original_full"}, "Camembert": {},
    "ConvBert": {"head_ratio": 2, "conv_kernel_size": 3}, "Data2VecText": {}, "Deberta": {},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "DistilBert": {},
    "Electra": {}, "Ernie": {}, "Esm": {"mask_token_id": 4}, "EuroBert": GROUPED,
    "Flaubert": {"emb_dim": 32}, "IBert": {}, "Longformer": {"attention_window": 4},
    "Luke": {"entity_vocab_size": 9, "entity_emb_size": 16}, "MegatronBert": {}, "MobileBert": {
        "true_hidden_size": 32, "intra_bottleneck_size": 32, "hidden_size": 64},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}, "MPNet": {},
    "Mra": {}, "MT5": {"d_kv": 8},
    "RemBert": {}, "Roberta": {}, "RobertaPreLayerNorm": {}, "RoCBert": {}, "RoFormer": {},
    "SqueezeBert": {}, "T5": {"d_kv": 8}, "XLM": {"emb_dim": 32}, "XLMRoberta": {},
    "XLMRobertaXL": {}, "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"}, "Yoso": {},
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "Bart": {}, "BioGpt": {}, "Bloom": {}, "Cohere": GROUPED, "CodeGen": {"rotary_dim": 4},
    "Falcon": {"new_decoder_architecture": False, "multi_query": False, "alibi": True},
    "Gemma": GROUPED, "Gemma2": GROUPED, "Gemma3": {**GROUPED, "sliding_window": 4}, "Glm": GROUPED,
    "GPT2": {}, "GPTBigCode": {}, "GPTJ": {"rotary_dim": 4},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]}, "GPTNeoX": {},
    "Granite": GROUPED, "Helium": GROUPED, "Llama": GROUPED, "Mistral": {**GROUPED},
    "Mixtral": {**GROUPED, "num_local_experts": 4}, "Mpt": {}, "Nemotron": GROUPED, "Olmo": {},
    "Olmo2": GROUPED, "OPT": {}, "Persimmon": {}, "Phi": {}, "Phi3": {**GROUPED},
    "Qwen2": {"num_key_value_heads": 2}, "Qwen3": GROUPED,
    "Qwen3Moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    "SmolLM3": GROUPED, "StableLm": {"num_key_value_heads": 2}, "Starcoder2": GROUPED, "XGLM": {},
    "XLNet": {},
}  # fmt: skip
"""Models by the first part of their class names -> what `SIZES` lacks for them."""


def build(name: str) -> nn.Module:
    """A tiny language model."""
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    config_class: Any = getattr(hf, f"{kind}Config")
    extra = MASKED[name] if name in MASKED else CAUSAL[name]
    known = vars(config_class())
    renamed = getattr(config_class, "attribute_map", {})
    sizes = {k: v for k, v in SIZES.items() if k in known or (k in renamed and renamed[k] in known)}
    sizes = {k: v for k, v in sizes.items() if renamed.get(k) not in sizes}
    torch.manual_seed(0)
    config = config_class(**{**sizes, **extra})
    model: nn.Module = getattr(hf, class_name(name))(config)
    return model.eval()


def class_name(name: str) -> str:
    """Name of the model's class."""
    special = {"GPT2": "GPT2LMHeadModel", "XLNet": "XLNetLMHeadModel", "XLM": "XLMWithLMHeadModel",
               "Flaubert": "FlaubertWithLMHeadModel", "T5": "T5ForConditionalGeneration",
               "MT5": "MT5ForConditionalGeneration"}  # fmt: skip
    return special.get(name, f"{name}For{'MaskedLM' if name in MASKED else 'CausalLM'}")


def example(name: str) -> dict[str, Tensor]:
    """Token ids to call it with."""
    ids = torch.arange(2 * 8).view(2, 8) * 7 % 90 + 5
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids[:, :4]} if name in ("T5", "MT5") else {}),
    }


Weights = dict[str, tuple[int, int]]
"""Weight -> the dimension along which units are read, and how many of its indices one unit has."""


def reads_heads(model: nn.Module) -> Weights:
    """The weights that read attention heads in repeated blocks."""
    found: Weights = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() != 2 or not re.search(r"\.\d+\.", name) or not name.endswith("weight"):
            continue
        if isinstance(owner, nn.Embedding) or "conv_" in name or "encoder_attn" in name:
            continue
        turned = isinstance(owner, hf.pytorch_utils.Conv1D)
        outputs, inputs = parameter.shape[::-1] if turned else parameter.shape
        unit = head_unit(model, name, outputs, inputs)
        if unit is not None and unit.cols is not None and unit.cols < inputs:
            found[name] = (0 if turned else 1, unit.cols)
    return found


def reads_channels(model: nn.Module) -> Weights:
    """The weights that read a feed-forward layer's hidden channels, those of experts too."""
    found: Weights = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() not in (2, 3) or "attention.self" in name:
            continue
        if not re.search(r"\.\d+\.|albert_layers", name) and "ffn" not in name:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, hf.pytorch_utils.Conv1D)
        inputs = 0 if turned else parameter.dim() - 1
        wide = SIZES["hidden_size"] * 4
        leaf = ".".join(name.split(".")[-2:])
        if parameter.shape[inputs] in (INNER, wide) and not re.search("gate|up_|emb", leaf):
            found[name] = (inputs, 1)
    return found


def kill(model: nn.Module, weights: Weights) -> None:
    """Zero what reads half of the units, other ones in each weight."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, (dim, width) in weights.items():
        parameter = parameters[name]
        units = parameter.shape[dim] // width
        dead = torch.randperm(units, generator=generator)[: units // 2]
        index = (dead[:, None] * width + torch.arange(width)).flatten()
        with torch.no_grad():
            parameter.index_fill_(dim, index, 0.0)


def outcome(name: str, kind: str) -> dict[str, Any]:
    """What convert leaves of one model: how many weights became half as wide, and why not."""
    model = build(name)
    weights = (reads_heads if kind == "heads" else reads_channels)(model)
    before = {n: dict(model.named_parameters())[n].shape[dim] for n, (dim, _) in weights.items()}
    if not weights:
        return {"weights": 0, "removed": 0, "reasons": []}
    kill(model, weights)
    try:
        small = mvpfx.convert(model, example_inputs=example(name), lowering="dense")
    except Exception as error:  # noqa: BLE001  the reason is the result
        text = f"convert fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return {"weights": len(weights), "removed": 0, "reasons": [text]}
    parameters = dict(small.named_parameters())
    removed = [n for n, (dim, _) in weights.items() if parameters[n].shape[dim] * 2 <= before[n]]
    left = [n for n in weights if n not in removed]
    return {
        "weights": len(weights),
        "removed": len(removed),
        "reasons": sorted(set(reasons(small, left))),
    }


def reasons(small: nn.Module, left: list[str]) -> Iterator[str]:
    """Why weights keep what is dead."""
    said = {d.site: d.reason for d in mvpfx.report_of(small).decisions if not d.applied}
    for name in left:
        text = said.get(name, "not said")
        text = re.sub(r"\d+ of \d+ (columns|rows) are zero, but ", "", text)
        yield re.sub(r"_\d+|\d+", "", text.partition(";")[0])


def run(names: list[str]) -> dict[str, Any]:
    """Both questions for all models."""
    models: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that miss optional kernels
        for name in tqdm(names, desc="removal", mininterval=1.0):
            row: dict[str, Any] = {"name": name, "class": class_name(name)}
            for kind in ("heads", "channels"):
                row[kind] = outcome(name, kind)
            models.append(row)
            print(name, row["heads"], row["channels"], flush=True)
    return {
        "benchmark": "removal",
        "question": "Of how many models are dead heads and channels removed in full?",
        "environment": results_file.environment(torch.device("cpu")),
        "totals": {kind: totals(models, kind) for kind in ("heads", "channels")},
        "models": models,
    }


def totals(models: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """Models that have such units, and those of which all dead ones are removed."""
    found = [model[kind] for model in models if model[kind]["weights"]]
    return {"models": len(found), "in_full": sum(m["removed"] == m["weights"] for m in found)}


def table(results: list[dict[str, Any]]) -> str:
    """The shares, before and after where there are two files, and what stays with its reason."""
    found = [result for result in results if result["benchmark"] == "removal"]
    if not found:
        return "No result files yet."
    rows = [
        {"mvpfx": result.get("label", "this version"), **{
            kind: "{in_full} of {models} models".format(**result["totals"][kind])
            for kind in ("heads", "channels")
        }}
        for result in found
    ]  # fmt: skip
    lines: list[str] = []
    for kind in ("heads", "channels"):
        by_reason: dict[str, list[str]] = {}
        for model in found[-1]["models"]:
            if model[kind]["removed"] < model[kind]["weights"]:
                by_reason.setdefault("; ".join(model[kind]["reasons"]), []).append(model["name"])
        lines += [f"- {kind} of {', '.join(names)}: {why}." for why, names in by_reason.items()]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join([text, "", "What stays, and why:", "", *lines])


def main(arguments: list[str] | None = None) -> None:
    """Convert all models and write what went."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.removal", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of models; all if none")
    parser.add_argument("--output", type=Path, help="where to write the result")
    parser.add_argument("--label", default="this version", help="what the table calls this run")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = run([n for n in (*MASKED, *CAUSAL) if not options.only or n in options.only])
    result["label"] = options.label
    if options.output:
        results_file.write(options.output, result)
    for kind in ("heads", "channels"):
        counts = result["totals"][kind]
        print(f"{kind}: {counts['in_full']} of {counts['models']} models")


if __name__ == "__main__":
    main()
