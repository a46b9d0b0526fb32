"""SparsityScheduler against the NumPy reference, its state, and its errors."""

import copy
import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvpfx import criteria
from mvpfx.optim import parameter_groups
from mvpfx.penalty import penalty
from mvpfx.schedule import ConstantSchedule, CubicSchedule
from mvpfx.scheduler import SparsityScheduler
from tests.reference import Array, Run
from tests.toy_masks import Stack, raises, values

TOTAL = 12
PLAN = CubicSchedule(warmup=2, cooldown=3)
BLOCKS: list[tuple[object, tuple[int, int]]] = [("element", (1, 1)), ((2, 3), (2, 3))]


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy().copy()


def drawn(stack: Stack, seed: int) -> list[Array]:
    """What the next forward draws for the scores of each mask."""
    scores = [mask.scores for mask in stack.mask_list if mask.scores is not None]
    torch.manual_seed(seed)
    noise = [array(torch.rand_like(held)) for held in scores]
    torch.manual_seed(seed)
    return noise


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(("granularity", "block"), BLOCKS)
@pytest.mark.parametrize("plain", [True, False], ids=["sgd", "adam"])
@pytest.mark.parametrize("criterion", criteria.names())
@pytest.mark.parametrize("score_init", ["zero", "magnitude"])
def test_scores_weights_and_masks_are_the_papers(
    score_init: str,
    criterion: str,
    plain: bool,
    granularity: object,
    block: tuple[int, int],
    scope: str,
    device: str,
) -> None:
    damping = {"damping": Run.damping} if criterion == "second_order" else {}
    stack = Stack(
        values(6, 12, device=device),
        values(8, 6, seed=1, device=device),
        plan=PLAN,
        criterion=criterion,
        granularity=granularity,
        density=0.3,
        scope=scope,
        score_init=score_init,
        threshold=0.5,
        penalty_lambda=3.0,
        criterion_options=damping,
    )
    run = Run(
        criterion=criterion,
        weights=[array(weight) for weight in stack.weights],
        scores=[array(m.scores) for m in stack.mask_list if m.scores is not None],
        block=block,
        density=0.3,
        pooled=scope == "global",
        total=TOTAL,
        warmup=2,
        cooldown=3,
        plain=plain,
    )
    groups = parameter_groups(stack, lr=run.lr, score_lr=run.score_lr, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups) if plain else torch.optim.Adam(groups)
    scheduler = SparsityScheduler(stack, TOTAL)
    for step in range(TOTAL):
        for mask, kept in zip(stack.mask_list, run.masks(), strict=True):
            np.testing.assert_array_equal(mask.kept().cpu().numpy(), kept)
        x, target = values(16, 12, seed=100 + step), values(16, 8, seed=200 + step)
        noise = drawn(stack, step)
        loss = (stack(x.to(device)) - target.to(device)).square().mean() + penalty(stack)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.step(array(x), array(target), noise)
        for weight, expected in zip(stack.weights, run.weights, strict=True):
            np.testing.assert_allclose(array(weight), expected, rtol=1e-4, atol=2e-5)
        for mask, expected in zip(stack.mask_list, run.scores, strict=False):
            scores = array(mask.require_scores())
            np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_count_is_exact_at_every_step_with_constant_scores(scope: str) -> None:
    stack = Stack(values(7, 9), values(5, 7), plan=PLAN, density=0.1, score_init=0, scope=scope)
    scheduler = SparsityScheduler(stack, 20)
    for _ in range(21):
        density = PLAN(scheduler.step_count, 20, 1.0, 0.1)
        assert scheduler.density == pytest.approx(density)
        kept = [int(mask.kept().sum()) for mask in stack.mask_list]
        if scope == "local":
            assert kept == [round(density * 63), round(density * 35)]
        else:
            assert sum(kept) == round(density * 98)
        if scheduler.step_count < 20:
            scheduler.step()


def test_density_is_over_the_sites_that_have_a_target() -> None:
    stack = Stack(values(2, 2), values(6, 2), plan=ConstantSchedule(), density=0.5)
    stack.mask_list[1].rule = stack.mask_list[0].rule.__class__(density=0.25)
    assert SparsityScheduler(stack, 5).density == pytest.approx((4 * 0.5 + 12 * 0.25) / 16)
    soft = Stack(values(2, 2), criterion="soft_movement", penalty_lambda=100.0)
    scheduler = SparsityScheduler(soft, 4)
    assert scheduler.density is None
    scheduler.step()
    now = CubicSchedule(0, 0)(1, 4, 0.0, 0.1)
    assert soft.mask_list[0].threshold == pytest.approx(now)
    assert soft.mask_list[0].penalty_lambda == pytest.approx(100 * now / 0.1)


def trained(stack: Stack, scheduler: SparsityScheduler, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        stack(values(4, 6, seed=step)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def test_resuming_is_exact() -> None:
    def fresh() -> tuple[Stack, SparsityScheduler, Any]:
        stack = Stack(values(6, 6), plan=PLAN, density=0.2)
        groups = parameter_groups(stack, lr=0.1)
        return stack, SparsityScheduler(stack, TOTAL), torch.optim.AdamW(groups)

    whole, scheduler, optimizer = fresh()
    trained(whole, scheduler, optimizer, range(7))
    saved = copy.deepcopy([part.state_dict() for part in (whole, scheduler, optimizer)])
    assert json.loads(json.dumps(saved[1])) == {"step_count": 7, "total_steps": TOTAL}
    trained(whole, scheduler, optimizer, range(7, TOTAL))

    resumed, scheduler, optimizer = fresh()
    for part, state in zip((resumed, scheduler, optimizer), saved, strict=True):
        part.load_state_dict(state)
    assert resumed.mask_list[0].density == PLAN(7, TOTAL, 1.0, 0.2)
    assert resumed.mask_list[0].step == scheduler.step_count == 7
    trained(resumed, scheduler, optimizer, range(7, TOTAL))
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(resumed.mask_list[0].kept(), whole.mask_list[0].kept())


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [
        (0, ValueError, "total_steps must be at least 1; found 0."),
        (-3, ValueError, "total_steps must be at least 1; found -3."),
        (10.0, TypeError, "total_steps must be a whole number; found 10.0 (float)."),
        (True, TypeError, "total_steps must be a whole number; found True (bool)."),
        (
            5,
            ValueError,
            "a warm-up of 2 and a cool-down of 3 steps leave no step to prune in: the run has "
            "total_steps=5. Train longer, or make warmup and cooldown of the schedule shorter.",
        ),
    ],
)
def test_bad_totals(total: Any, error: type[Exception], message: str) -> None:
    with raises(error, message):
        SparsityScheduler(Stack(values(4, 4), plan=PLAN), total)


def test_past_the_end() -> None:
    scheduler = SparsityScheduler(Stack(values(4, 4)), 2)
    scheduler.step()
    scheduler.step()
    message = (
        "step 3 is past the end: the run has total_steps=2. Call scheduler.step() once per "
        "optimizer step, not per batch, or build SparsityScheduler with as many total_steps as you "
        "take."
    )
    with raises(ValueError, message):
        scheduler.step()
    assert scheduler.step_count == 2


def test_nothing_to_schedule() -> None:
    message = (
        "Linear has no masks to schedule. "
        "Call mvpfx.prepare(model) before SparsityScheduler(model, ...); where its matmuls are "
        "functional, with example_inputs=."
    )
    with raises(ValueError, message):
        SparsityScheduler(nn.Linear(2, 2), 10)


FOREIGN = (
    "a scheduler's state has step_count, total_steps; found {}. "
    "Pass what scheduler.state_dict() returned."
)
STATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, FOREIGN.format("nothing")),
    ({"last_epoch": 3}, ValueError, FOREIGN.format("last_epoch")),
    (
        {"step_count": 3, "total_steps": 9},
        ValueError,
        "the saved run has total_steps=9, this one 10. "
        "Build SparsityScheduler(model, total_steps=9) to resume it.",
    ),
    (
        {"step_count": 11, "total_steps": 10},
        ValueError,
        "step_count 11 is past the end: total_steps=10.",
    ),
    (
        {"step_count": -1, "total_steps": 10},
        ValueError,
        "step_count must be at least 0; found -1.",
    ),
    (
        {"step_count": 1.5, "total_steps": 10},
        TypeError,
        "step_count must be a whole number; found 1.5 (float).",
    ),
]


@pytest.mark.parametrize(("state", "error", "message"), STATES)
def test_bad_states(state: dict[str, Any], error: type[Exception], message: str) -> None:
    scheduler = SparsityScheduler(Stack(values(4, 4)), 10)
    with raises(error, message):
        scheduler.load_state_dict(state)


def test_masks_are_found_once_and_inside_wrappers() -> None:
    stack = Stack(values(4, 4), values(4, 4))
    both = nn.ModuleList([stack, nn.Sequential(stack)])
    scheduler = SparsityScheduler(both, 10)
    assert len(scheduler._masks) == 2
    assert all(a is b for a, b in zip(scheduler._masks, stack.mask_list, strict=True))
    assert len(list(product(scheduler._masks))) == 2
