"""Models with both masks and adapters of PEFT, made in either order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.mask import Mask
from mvpfx.state import state_of
from tests.training import half, shuffle_scores
from tests.training import masks_of as all_masks
from tests.zoo import ZOO

peft: Any = pytest.importorskip("peft")

ORDERS = ("adapters first", "masks first")
TARGETS = {"BERT": ["query", "dense"], "Llama": ["q_proj", "down_proj"]}


def with_adapters(model: Any, name: str = "BERT", **options: Any) -> Any:
    """A model with adapters whose weights are not zero."""
    config = peft.LoraConfig(target_modules=TARGETS[name], r=2, **options)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_" in parameter_name and "magnitude" not in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def both(order: str, name: str = "BERT", **options: Any) -> Any:
    """A model with masks and adapters, made in the given order; scores are random and learn."""
    model = ZOO[name].model()
    if order == "adapters first":
        model = mvpfx.prepare(with_adapters(model, name, **options), half())
    else:
        model = with_adapters(mvpfx.prepare(model, half()), name, **options)
        train_scores(model)
    shuffle_scores(model)
    return model


def masks_of(model: Any) -> list[Mask]:
    """The masks of a model, their sites named as they are now."""
    state_of(model)
    return all_masks(model)


def train_scores(model: Any) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".scores"):
            parameter.requires_grad_()


def reference(model: Any, name: str = "BERT", **options: Any) -> Any:
    """Adapters alone, on weights that are zero where the masks of `model` are."""
    raw = with_adapters(ZOO[name].model(), name, **options)
    with torch.no_grad():
        for mask in masks_of(model):
            raw.get_base_model().get_parameter(mask.site.name).mul_(mask.mask())
    if options.get("use_dora"):  # the norms that DoRA starts from were taken with the raw weights
        parameters = dict(model.named_parameters())
        for parameter_name, parameter in raw.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data.copy_(parameters[parameter_name])
    return raw
