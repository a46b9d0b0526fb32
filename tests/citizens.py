"""Converted models to be used like any other: structured, and with sparse storages."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

import mvpfx
from tests.models import Batch, build

MODELS = ("bert", "llama_cached", "gpt2")
STORAGES = ("dense", "csr", "bsr", "native")
_PRODUCERS = ("intermediate.dense", "gate_proj", "up_proj")
_HEADS = {"attention.self.value": 8, "v_proj": 8}


@functools.cache
def _made(name: str, lowering: str) -> tuple[nn.Module, nn.Module, Batch]:
    model, batch = build(name)
    model.eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for full, module in model.named_modules():
            weight: Any = module._parameters.get("weight")
            if weight is None or weight.dim() != 2 or not any(c.isdigit() for c in full):
                continue
            weight *= torch.rand(weight.shape, generator=generator) < 0.5
            if full.endswith("c_fc"):  # [in, out]
                weight[:, :24] = 0
            if full.endswith(_PRODUCERS):
                weight[:24] = 0
            for end, rows in _HEADS.items():
                if full.endswith(end):
                    weight[:rows] = 0
            if full.endswith("c_attn"):
                weight[:, 64:72] = 0
    small = mvpfx.convert(model, example_inputs=batch, lowering=lowering)
    return model, small, batch


def citizen(name: str, lowering: str) -> tuple[nn.Module, nn.Module, Batch]:
    """A model with zeros, what it was converted to, and a batch without labels; all to keep."""
    model, small, batch = copy.deepcopy(_made(name, lowering))
    return model, small, {key: value for key, value in batch.items() if key != "labels"}


def labels(batch: Batch, name: str) -> Batch:
    """The batch with something to learn."""
    learned = torch.tensor([0, 1]) if name == "bert" else batch["input_ids"]
    return {**batch, "labels": learned}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
