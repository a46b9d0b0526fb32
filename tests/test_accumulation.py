"""Scores that accumulate: Eq. 4 of Sanh et al. 2020, without gradients or moments of scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
import mvpfx.hf
from mvpfx.optim import parameter_groups
from mvpfx.pruning_callback import check_groups
from mvpfx.scheduler import masks_of
from tests.toy_masks import raises, sharded, values

UNITS: list[object] = ["element", (4, 8), "row", "column", "2:4"]
STEPS = 6


def prepared(accumulates: bool = True, model: nn.Module | None = None, **fields: Any) -> nn.Module:
    """A model whose density falls at every step."""
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    settings: dict[str, Any] = {
        "schedule": mvpfx.LinearSchedule(warmup=0, cooldown=1),
        "score_init": "magnitude",
        "criterion_options": {"accumulate": int(accumulates)},
        "density": 0.5 if fields.get("granularity") == "2:4" else 0.3,
    }
    return mvpfx.prepare(model, mvpfx.PruningConfig(**{**settings, **fields}))


def train(
    model: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, batches: int = 2
) -> list[Tensor]:
    """All masks after each step."""
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    groups = parameter_groups(model, lr=0.05, score_lr=3.0, weight_decay=0.0)
    taken = optimizer(groups)  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    for _ in range(STEPS):
        for _ in range(batches):
            x = torch.randn(8, 32, generator=generator)
            (model(x).square().mean() / batches).backward()
        taken.step()
        taken.zero_grad()
        scheduler.step()
        found.append(torch.cat([mask.mask().flatten() for mask in masks_of(model)]))
    return found


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("units", UNITS, ids=str)
def test_it_is_gradient_descent_on_scores(units: object, scope: str, way: str) -> None:
    model = prepared(granularity=units, scope=scope)
    twin = prepared(False, granularity=units, scope=scope)
    found, wanted = train(model), train(twin)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not found[-1].all(), "something was pruned"
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_scores_and_gradients_are_written_where_they_are(way: str) -> None:
    model = prepared()
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    taken = torch.optim.SGD(parameter_groups(model, lr=0.05, score_lr=3.0))
    scheduler.step()
    model(values(4, 32)).sum().backward()
    (mask, *_) = masks_of(model)
    weight, scores = mask.weight, mask.require_scores()
    kept, whole, before = mask.mask().clone(), weight.grad, scores.detach().clone()
    assert whole is not None and not kept.all()
    gradient, old = whole.clone(), weight.detach().clone()
    version = scores._version
    taken.step()
    assert weight.grad is not None and torch.equal(weight.grad, gradient * kept)
    torch.testing.assert_close(scores.detach(), before - 3.0 * gradient * old)
    assert scores._version > version, "masks see it"


def test_scores_have_no_gradient_and_no_state() -> None:
    model = prepared()
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, score_lr=0.5))
    before = [mask.require_scores().clone() for mask in masks_of(model)]
    model(values(8, 32)).square().mean().backward()
    assert all(mask.require_scores().grad is None for mask in masks_of(model))
    optimizer.step()
    scheduler.step()
    for mask, old in zip(masks_of(model), before, strict=True):
        assert mask.scores not in optimizer.state
        assert not torch.equal(mask.require_scores(), old)


def test_the_rate_is_that_of_the_scores_group_now() -> None:
    changes: list[Tensor] = []
    for factor in (1.0, 3.0):
        model = prepared()
        scheduler = mvpfx.SparsityScheduler(model, STEPS)
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0, score_lr=0.5))
        optimizer.param_groups[-1]["lr"] *= factor
        (first, *_) = masks_of(model)
        before = first.require_scores().clone()
        model(values(8, 32)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        changes.append(first.require_scores() - before)
    torch.testing.assert_close(changes[1], 3 * changes[0], rtol=1e-3, atol=1e-6)


def test_the_weight_keeps_what_its_mask_lets_through() -> None:
    model = prepared(schedule=mvpfx.ConstantSchedule())
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0))
    mask = masks_of(model)[0]
    before, kept = mask.weight.detach().clone(), mask.mask().clone()
    model(values(8, 32)).square().mean().backward()
    assert mask.weight.grad is not None
    assert mask.weight.grad[~kept].any(), "whole until the optimizer steps"
    optimizer.step()
    assert not mask.weight.grad[~kept].any()
    assert torch.equal(mask.weight[~kept], before[~kept])
    assert scheduler.step_count == 0


def test_without_a_scheduler_gradients_are_masked_at_once() -> None:
    model = prepared(schedule=mvpfx.ConstantSchedule())
    for watched in (False, True, False):
        scheduler = mvpfx.SparsityScheduler(model, STEPS) if watched else None
        mask = masks_of(model)[0]
        model(values(8, 32)).square().mean().backward()
        assert mask.weight.grad is not None
        assert bool(mask.weight.grad[~mask.mask()].any()) == watched
        model.zero_grad()
        del scheduler


def test_the_newest_scheduler_alone_accumulates() -> None:
    model = prepared()
    first = mvpfx.SparsityScheduler(model, STEPS)
    twin = copy.deepcopy(model)
    schedulers = [mvpfx.SparsityScheduler(model, STEPS), mvpfx.SparsityScheduler(twin, STEPS)]
    for one in (model, twin):
        optimizer = torch.optim.SGD(parameter_groups(one, lr=0.1))
        one(values(8, 32)).square().mean().backward()
        optimizer.step()
    for one, other in zip(masks_of(model), masks_of(twin), strict=True):
        assert torch.equal(one.require_scores(), other.require_scores())
    assert [first.step_count, *(s.step_count for s in schedulers)] == [0, 0, 0]


def test_measured_scores_go_on_from_their_sums() -> None:
    schedule = mvpfx.LinearSchedule(warmup=2, cooldown=1)
    model = prepared(score_init="sensitivity", schedule=schedule)
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0, score_lr=0.5, weight_decay=0.0))
    mask, x = masks_of(model)[0], values(8, 32)
    wanted = torch.zeros_like(mask.weight)
    for step in range(4):
        model(x).square().mean().backward()
        assert mask.weight.grad is not None
        movement = 0.5 * mask.weight.grad * mask.weight.detach()
        wanted += movement.abs() if step < 2 else -movement
        measuring = mask.measuring
        assert measuring == (step < 3), step
        if measuring and step == 2:
            wanted += movement + movement.abs()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        torch.testing.assert_close(mask.require_scores().detach(), wanted)


def test_channels_accumulate_over_all_weights_that_they_are_in() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def channels(accumulates: bool) -> nn.Module:
        config = mvpfx.PruningConfig(
            criterion_options={"accumulate": int(accumulates)},
            granularity="channel",
            density=0.3,
            score_init="magnitude",
            schedule=mvpfx.LinearSchedule(warmup=0, cooldown=1),
        )
        return mvpfx.prepare(model(), config, example_inputs=(values(2, 32),))

    found, wanted = train(channels(True)), train(channels(False))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_accumulates() -> None:
    torch.compiler.reset()
    model, twin = prepared(), prepared()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, call in ((model, compiled), (twin, twin)):
        scheduler = mvpfx.SparsityScheduler(one, STEPS)
        optimizer = torch.optim.SGD(parameter_groups(one, lr=0.1))
        for _ in range(3):
            call(values(8, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for one, other in zip(masks_of(model), masks_of(twin), strict=True):
        torch.testing.assert_close(one.require_scores(), other.require_scores())
        assert torch.equal(one.mask(), other.mask()) and not one.mask().all()
    torch.compiler.reset()


def test_an_optimizer_that_a_trainer_made() -> None:
    model = prepared()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = mvpfx.hf.separate_scores(torch.optim.AdamW(trained), model, score_lr=0.5)
    check_groups(model, optimizer.param_groups)
    assert optimizer.param_groups[-1]["params"] == [m.scores for m in masks_of(model)]
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    before = [mask.require_scores().clone() for mask in masks_of(model)]
    model(values(8, 32)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    for mask, old in zip(masks_of(model), before, strict=True):
        assert not torch.equal(mask.require_scores(), old)


def test_an_optimizer_without_the_scores() -> None:
    model = prepared()
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    weights = [mask.weight for mask in masks_of(model)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model(values(8, 32)).square().mean().backward()
    message = (
        "the optimizer holds 0.weight and not its scores, whose learning rate movement accumulates "
        "by. Make it with torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...))."
    )
    with raises(ValueError, message):
        optimizer.step()
    assert scheduler.step_count == 0


def test_a_weight_that_does_not_train() -> None:
    model = prepared()
    masks_of(model)[1].weight.requires_grad_(False)
    message = (
        "2.weight does not train, and scores that accumulate take their changes from its gradient. "
        "Leave accumulate out of criterion_options there."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(model, STEPS)


def test_a_weight_that_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    monkeypatch.setattr("mvpfx.accumulation.is_sharded", sharded)
    message = (
        "0.weight is sharded over ranks, and scores accumulate by whole weights. "
        "Leave accumulate out of criterion_options there."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(model, STEPS)


def test_a_weight_that_is_looked_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)
            self.table = nn.Embedding(9, 4)
            self.table.weight = self.head.weight

    model = prepared(model=Tied())
    message = (
        "head.weight is an embedding too, whose lookups are not masked, so its gradient does not "
        "tell what the scores get. Leave accumulate out of criterion_options there."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(model, STEPS)
