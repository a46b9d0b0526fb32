"""Converted models to be used like any other: structured, and with sparse storages."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any
from unittest import mock

import torch
from torch import nn

import mvpfx
from mvpfx.comparison import Comparison
from mvpfx.facts import NATIVE_DENSE
from mvpfx.kernels.library import LIBRARY
from tests.models import Batch, build

MODELS = ("bert", "llama_cached", "gpt2")
STORAGES = ("dense", "csr", "bsr", "native", *((NATIVE_DENSE,) if LIBRARY else ()))
_PRODUCERS = ("intermediate.dense", "gate_proj", "up_proj")
_HEADS = {"attention.self.value": 8, "v_proj": 8}


@functools.cache
def _made(name: str, lowering: str) -> tuple[nn.Module, nn.Module, Batch]:
    model, batch = build(name)
    model.eval()
    density = 0.9 if lowering == NATIVE_DENSE else 0.5
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for full, module in model.named_modules():
            weight: Any = module._parameters.get("weight")
            if weight is None or weight.dim() != 2 or not any(c.isdigit() for c in full):
                continue
            weight *= torch.rand(weight.shape, generator=generator) < density
            if full.endswith("c_fc"):  # [in, out]
                weight[:, :24] = 0
            if full.endswith(_PRODUCERS):
                weight[:24] = 0
            for end, rows in _HEADS.items():
                if full.endswith(end):
                    weight[:rows] = 0
            if full.endswith("c_attn"):
                weight[:, 64:72] = 0
    if lowering == NATIVE_DENSE:
        return model, native_dense(model, batch), batch
    return model, mvpfx.convert(model, example_inputs=batch, lowering=lowering), batch


def native_dense(model: nn.Module, batch: Any) -> nn.Module:
    """What `convert` gives where native kernels are fastest for dense weights too."""

    def last(_: Comparison, *versions: str) -> str:
        return versions[-1]

    def is_clearly_faster(_: Comparison, version: str, other: str) -> bool:
        return version != "dense"

    with (
        mock.patch.object(Comparison, "fastest", last),
        mock.patch.object(Comparison, "is_clearly_faster", is_clearly_faster),
        mock.patch("mvpfx.conversion.EDGES", math.inf),
    ):
        return mvpfx.convert(model, example_inputs=batch)


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
