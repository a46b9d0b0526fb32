"""Masks that are frozen and weights that go back, in whole models and across checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import mvpfx
from mvpfx import criteria
from tests.test_criteria import Loop
from tests.toy_masks import Stack, raises, sharded, values
from tests.training import masks_of
from tests.zoo import ZOO

FREEZING = mvpfx.LinearSchedule(warmup=1, cooldown=3, freeze=True)
REWINDING = mvpfx.StepSchedule(warmup=1, cooldown=1, cuts=2, rewind_to=1)


def prepared(schedule: Any, **fields: Any) -> Any:
    config = mvpfx.PruningConfig(schedule=schedule, density=0.4, **fields)
    return mvpfx.prepare(ZOO["BERT"].model(), config)


@pytest.mark.parametrize("criterion", criteria.names())
def test_frozen_masks_stay_whatever_scores_do(criterion: str) -> None:
    torch.manual_seed(0)
    loop = Loop(prepared(FREEZING, criterion=criterion, scope="global", threshold=0.7))
    loop.run(2)
    assert not any(mask.frozen for mask in masks_of(loop.model))
    loop.run(1)
    frozen = [mask.mask().clone() for mask in masks_of(loop.model)]
    with torch.no_grad():
        for mask in masks_of(loop.model):
            mask.weight.normal_()
            if mask.scores is not None:
                mask.scores.normal_(std=5.0)
    loop.run(2)
    for mask, kept in zip(masks_of(loop.model), frozen, strict=True):
        assert mask.frozen and torch.equal(mask.mask(), kept)
        mask.frozen = False
        mask.forget()
    thawed = [mask.mask() for mask in masks_of(loop.model)]
    assert any(not torch.equal(a, b) for a, b in zip(thawed, frozen, strict=True))


def test_masks_move_before_the_cool_down_and_not_in_it() -> None:
    loop = Loop(prepared(FREEZING))
    seen: list[list[torch.Tensor]] = []
    for _ in range(6):
        loop.run(1)
        seen.append([mask.kept().clone() for mask in masks_of(loop.model)])
        with torch.no_grad():
            for mask in masks_of(loop.model):
                mask.require_scores().add_(torch.randn_like(mask.require_scores()))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in pairwise(seen)
    ]
    assert moved == [True, True, False, False, False]


@pytest.mark.parametrize("order", ["model first", "scheduler first"])
@pytest.mark.parametrize("schedule", [FREEZING, REWINDING], ids=["freeze", "rewind"])
@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_is_the_same(schedule: Any, at: int, order: str, tmp_path: Path) -> None:
    whole = Loop(prepared(schedule))
    whole.run(at)
    mvpfx.save_checkpoint(tmp_path / f"checkpoint-{at}", whole.model, **whole.parts)
    state = {name: value.clone() for name, value in whole.model.state_dict().items()}
    steps = whole.scheduler.state_dict()
    wanted = whole.run(6 - at)
    resumed = Loop(prepared(schedule))
    mvpfx.load_checkpoint(tmp_path / f"checkpoint-{at}", resumed.model, **resumed.parts)
    if order == "model first":  # as transformers' Trainer does
        resumed.model.load_state_dict(state)
        resumed.scheduler = mvpfx.SparsityScheduler(resumed.model, total_steps=6)
        resumed.scheduler.load_state_dict(steps)
    found = resumed.run(6 - at)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    for one, other in zip(masks_of(found), masks_of(wanted), strict=True):
        assert torch.equal(one.mask(), other.mask())


def test_weights_go_back_after_each_cut() -> None:
    stack = Stack(values(6, 8), values(4, 6), plan=REWINDING, density=0.25)
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=6)
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(stack, lr=0.1))
    after: list[list[torch.Tensor]] = []
    for step in range(6):
        stack(values(5, 8, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        after.append([weight.detach().clone() for weight in stack.weights])
    for number, weights in enumerate(after, start=1):
        same = all(torch.equal(a, b) for a, b in zip(weights, after[0], strict=True))
        assert same == (number in (1, 3, 5)), number
    assert [mask.density_now for mask in stack.mask_list] == [0.25, 0.25]


def test_nothing_is_stored_where_nothing_is_frozen_or_rewound() -> None:
    keys = prepared(mvpfx.CubicSchedule()).state_dict()
    assert not [key for key in keys if "frozen" in key or "remembered" in key]


def test_frozen_masks_convert() -> None:
    model = Loop(prepared(FREEZING)).run(6).eval()
    with torch.no_grad():
        for mask in masks_of(model):
            mask.require_scores().neg_()
    batch = ZOO["BERT"].batch(0)
    small = mvpfx.convert(model, example_inputs=batch)
    torch.testing.assert_close(small(**batch).logits, model(**batch).logits)
    assert not [key for key in small.state_dict() if "frozen" in key]


def test_sharded_weights_cannot_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(values(4, 4), plan=REWINDING)
    monkeypatch.setattr("mvpfx.scheduler.is_sharded", sharded)
    message = (
        "stack.0.weight is sharded over ranks, and rewind_to remembers whole weights. "
        "Use DDP, or leave rewind_to out."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(stack, total_steps=6)
