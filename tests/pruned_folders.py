"""Folders as transformers 4 wrote them: tensors cut by hand, and models that compute the same.

Nothing here uses the loader: rows and columns are cut by names written down below, and the
reference is the whole model with the inputs of a projection set to zero by a hook.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, HEADS, HEAD, INNER = 32, 4, 8, 48
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """Where a class keeps what is cut; `{}` is the number of a layer."""

    kind: str
    config: Any
    inputs: tuple[str, ...]
    output: str
    wide: str
    narrow: str
    fused: bool = False


def _bert_like(kind: str, config: Any, base: str) -> Family:
    layer = f"{base}.encoder.layer.{{}}"
    inputs = tuple(f"{layer}.attention.self.{n}" for n in ("query", "key", "value"))
    output = f"{layer}.attention.output.dense"
    wide, narrow = f"{layer}.intermediate.dense", f"{layer}.output.dense"
    return Family(kind, config, inputs, output, wide, narrow)


def families() -> dict[str, Family]:
    t, task = transformers, "ForSequenceClassification"
    distil = "distilbert.transformer.layer.{}."
    albert = "albert.encoder.albert_layer_groups.{}.albert_layers.0."
    gpt = "transformer.h.{}."
    return {
        "BERT": _bert_like(f"Bert{task}", t.BertConfig(**_SIZES), "bert"),
        "RoBERTa": _bert_like(f"Roberta{task}", t.RobertaConfig(**_SIZES), "roberta"),
        "ELECTRA": _bert_like(
            f"Electra{task}", t.ElectraConfig(**_SIZES, embedding_size=16), "electra"
        ),
        "DistilBERT": Family(
            f"DistilBert{task}",
            t.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
            tuple(f"{distil}attention.{n}_lin" for n in "qkv"),
            f"{distil}attention.out_lin",
            f"{distil}ffn.lin1",
            f"{distil}ffn.lin2",
        ),
        "ALBERT": Family(
            f"Albert{task}",
            t.AlbertConfig(**_SIZES, embedding_size=16, num_hidden_groups=2),
            tuple(f"{albert}attention.{n}" for n in ("query", "key", "value")),
            f"{albert}attention.dense",
            f"{albert}ffn",
            f"{albert}ffn_output",
        ),
        "GPT-2": Family(
            "GPT2LMHeadModel",
            t.GPT2Config(
                vocab_size=99,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_inner=48,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            ),
            (f"{gpt}attn.c_attn",),
            f"{gpt}attn.c_proj",
            f"{gpt}mlp.c_fc",
            f"{gpt}mlp.c_proj",
            fused=True,
        ),
    }


Absent = Mapping[int, list[int]]


def full_model(family: Family) -> nn.Module:
    """A model of full size with random weights and biases that are not zero."""
    torch.manual_seed(0)
    model = getattr(transformers, family.kind)(family.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def features(heads: list[int]) -> list[int]:
    return [head * HEAD + index for head in heads for index in range(HEAD)]


def silence(family: Family, model: nn.Module, heads: Absent, units: Absent) -> nn.Module:
    """Set what absent heads and hidden units hand on to zero, in each call."""

    def without(place: str, keep: Tensor, gone: list[int]) -> None:
        keep[gone] = 0
        module = model.get_submodule(place)

        def silenced(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * keep, *args[1:])

        module.register_forward_pre_hook(silenced)

    for layer, gone in heads.items():
        without(family.output.format(layer), torch.ones(WIDTH), features(gone))
    for layer, gone in units.items():
        without(family.narrow.format(layer), torch.ones(INNER), gone)
    return model


def cut(family: Family, tensors: dict[str, Tensor], heads: Absent, units: Absent) -> None:
    """Take heads and hidden units out of a state dict, in place."""
    conv1d = family.fused  # weights are [in, out]

    def take(name: str, kept: list[int], outputs: bool) -> None:
        weight = f"{name}.weight"
        dim = int(conv1d) if outputs else 1 - int(conv1d)
        index = torch.tensor(kept, dtype=torch.long)
        tensors[weight] = tensors[weight].index_select(dim, index)
        if outputs:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].index_select(0, index)

    for layer, gone in heads.items():
        kept = features([head for head in range(HEADS) if head not in gone])
        rows = [part * WIDTH + k for part in range(3) for k in kept] if family.fused else kept
        for name in family.inputs:
            take(name.format(layer), rows, outputs=True)
        take(family.output.format(layer), kept, outputs=False)
    for layer, gone in units.items():
        kept = [unit for unit in range(INNER) if unit not in gone]
        take(family.wide.format(layer), kept, outputs=True)
        take(family.narrow.format(layer), kept, outputs=False)


def write_folder(
    folder: Path, family: Family, heads: Absent, units: Absent, file: str = "pytorch_model.bin"
) -> nn.Module:
    """Write a folder; returns the reference model."""
    model: Any = full_model(family)
    tied = set(model.all_tied_weights_keys)
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    cut(family, tensors, heads, units)
    body = {**family.config.to_dict(), "architectures": [family.kind]}
    body["pruned_heads"] = {str(layer): gone for layer, gone in heads.items()}
    (folder / "config.json").write_text(json.dumps(body))
    if file == "model.safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    return silence(family, model, heads, units)
