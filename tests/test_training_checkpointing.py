"""Gradient checkpointing: activations are thrown away, and computed again in the backward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mvpfx
from tests.training import (
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    pair,
    shuffle_scores,
    whole,
)

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "GPT-2", "Llama", "T5", "ViT"]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])


def enable(model: Any, reentrant: bool) -> None:
    model.train()
    model.enable_input_require_grads()  # reentrant: without it the first block has no gradient
    switch(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})


def switch(method: Callable[..., Any], *args: Any) -> None:
    """Call a method whose name transformers is about to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        method(*args)


@REENTRANT
@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks(name: str, called: bool, reentrant: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        for model in (raw, prepared):
            model.train()
        assert_same_step(prepared, raw, batch)
    for model in (raw, prepared):
        model.zero_grad()
        enable(model, reentrant)
    for _ in range(2):
        assert_same_step(prepared, raw, batch)
    for model in (raw, prepared):
        model.zero_grad()
        switch(model.gradient_checkpointing_disable)
    assert_same_step(prepared, raw, batch)


@REENTRANT
def test_checkpointing_draws_dropout_again(reentrant: bool) -> None:
    plain, _, batch = pair("BERT")
    _, prepared, _ = pair("BERT")
    plain.train()
    enable(prepared, reentrant)
    assert_same_step(prepared, plain, batch)


@REENTRANT
def test_autocast_around_checkpointed_blocks(reentrant: bool) -> None:
    raw, prepared, batch = masked_pair("BERT")
    for model in (raw, prepared):
        enable(model, reentrant)
    results: list[Tensor] = []
    for model in (raw, prepared):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(**batch)
        result.loss.backward()
        results.append(result.logits)
    torch.testing.assert_close(*results)
    gradients = {n: p.grad for n, p in raw.named_parameters()}
    kept = {mask.site.name: mask.mask() for mask in masks_of(prepared)}
    for name, parameter in prepared.named_parameters():
        if not name.endswith("_mask.scores") and gradients[name] is not None:
            wanted = gradients[name] * kept.get(name, 1)
            torch.testing.assert_close(parameter.grad, wanted)


class Inside(nn.Module):
    """Checkpoints a part of itself, so that no graph can hold it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(0.3)
        self.reentrant = reentrant

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.dropout(torch.tanh(x)))) @ self.third.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant)  # pyright: ignore[reportAssignmentType]
        return x + self.third(x)


def twins(raw: Any, config: mvpfx.PruningConfig, **options: Any) -> Any:
    """A prepared copy; where its masks are not all ones, `raw` is multiplied by them."""
    prepared = mvpfx.prepare(copy.deepcopy(raw), config, **options)
    shuffle_scores(prepared)
    with torch.no_grad():
        for mask in masks_of(prepared):
            raw.get_parameter(mask.site.name).mul_(mask.mask())
    return prepared


@REENTRANT
def test_a_checkpoint_inside_a_region(reentrant: bool) -> None:
    raw = Inside(reentrant)
    prepared = twins(raw, half())
    assert_same_step(prepared, raw, {"x": torch.randn(5, 8)})
    assert "activation checkpointing inside the region" in mvpfx.explain(prepared)


@REENTRANT
def test_checkpoints_around_parts_of_a_model(reentrant: bool) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(4)]
            self.blocks = nn.ModuleList(blocks)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in list(self.blocks)[:2]:
                x = checkpoint(block, x, use_reentrant=reentrant)  # pyright: ignore[reportAssignmentType]
            rest = nn.Sequential(*list(self.blocks)[2:])
            return self.head(checkpoint_sequential(rest, 2, x, use_reentrant=reentrant))

    for config in (whole(), half()):
        raw = Around()
        prepared = twins(raw, config)
        for _ in range(2):
            assert_same_step(prepared, raw, {"x": torch.randn(5, 8, requires_grad=True)})


@REENTRANT
def test_a_checkpoint_around_the_whole_model(reentrant: bool) -> None:
    raw, prepared, batch = masked_pair("BERT")
    ids = batch["input_ids"]
    for model in (raw, prepared):
        model.train()
        embedded = model.get_input_embeddings()(ids)
        torch.manual_seed(0)

        def run(x: Tensor, model: Any = model) -> Tensor:
            return model(inputs_embeds=x).logits

        out: Any = checkpoint(run, embedded, use_reentrant=reentrant)
        out.square().sum().backward()
        model.result = out
    torch.testing.assert_close(prepared.result, raw.result)
    for mask in masks_of(prepared):
        gradient = raw.get_parameter(mask.site.name).grad
        weight = prepared.get_parameter(mask.site.name)
        torch.testing.assert_close(mask.require_scores().grad, gradient * weight.detach())
        torch.testing.assert_close(weight.grad, gradient * mask.mask())
