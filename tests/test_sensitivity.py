"""First scores that are measured: what the loss would miss, while nothing is pruned yet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mvpfx
from mvpfx import criteria
from mvpfx.mask import Mask
from mvpfx.schedule import ConstantSchedule, CubicSchedule, Schedule
from mvpfx.score_init import rank
from tests.toy_masks import Stack, make_mask, raises, values
from tests.training import masks_of
from tests.zoo import ZOO

WARMUP = 4
PLAN = CubicSchedule(warmup=WARMUP, cooldown=2)


class Loop:
    """Two matrices that learn a third; every step keeps what the scores' gradients were."""

    def __init__(self, plan: Schedule = PLAN, total_steps: int = 12, **fields: Any) -> None:
        settings = {"density": 0.25, "score_init": "sensitivity", **fields}
        self.stack = Stack(values(6, 8), values(8, 6, seed=1), plan=plan, **settings)
        self.scheduler = mvpfx.SparsityScheduler(self.stack, total_steps)
        groups = mvpfx.parameter_groups(self.stack, lr=0.01, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(groups)
        self.changes: list[list[Tensor]] = []

    @property
    def masks(self) -> list[Mask]:
        return self.stack.mask_list

    def step(self) -> None:
        number = self.scheduler.step_count
        error = self.stack(values(16, 8, seed=number)) - values(16, 8, seed=100 + number)
        error.square().mean().backward()
        gradients = [mask.require_scores().grad for mask in self.masks]
        self.changes.append([g.abs() for g in gradients if g is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def summed(loop: Loop, site: int) -> Tensor:
    """The changes of one site, added up in their order."""
    total = torch.zeros_like(loop.changes[0][site])
    for each in loop.changes:
        total += each[site]
    return total


@pytest.mark.parametrize("granularity", ["element", (2, 2), "row"])
def test_scores_are_sums_until_the_first_cut_and_ranks_after_it(granularity: object) -> None:
    loop = Loop(granularity=granularity)
    for step in range(1, WARMUP + 1):
        loop.step()
        for i, mask in enumerate(loop.masks):
            assert mask.measuring and bool(mask.kept().all())
            total = summed(loop, i)
            assert len(loop.changes) == step
            torch.testing.assert_close(mask.require_scores().detach(), total)
    loop.step()  # density falls: one more gradient is in the sum
    for i, mask in enumerate(loop.masks):
        total = summed(loop, i)
        assert not mask.measuring
        torch.testing.assert_close(mask.require_scores().detach(), rank(total) * 6)
    first = [mask.require_scores().detach().clone() for mask in loop.masks]
    loop.step()
    for mask, before in zip(loop.masks, first, strict=True):
        moved = (mask.require_scores().detach() - before).abs()
        assert 0 < float(moved.max()) <= 1.01e-2, "Adam's first step is the score_lr"


def test_units_that_no_gradient_reached_rank_by_magnitude() -> None:
    loop = Loop()
    for _ in range(WARMUP + 1):
        loop.scheduler.step()
    for mask in loop.masks:
        torch.testing.assert_close(mask.require_scores().detach(), rank(mask.weight) * 6)


def test_a_schedule_without_a_start_has_magnitude() -> None:
    mask, weight = make_mask(values(8, 8), density=0.25, score_init="sensitivity")
    mask.plan = ConstantSchedule()
    assert mask.measures and not mask.measuring
    torch.testing.assert_close(mask.require_scores().detach(), rank(weight.detach()) * 2)


def test_a_site_that_stays_whole_is_never_ranked() -> None:
    loop = Loop(density=1.0)
    for _ in range(8):
        loop.step()
    assert all(mask.measuring for mask in loop.masks)
    assert all(bool(mask.kept().all()) for mask in loop.masks)


def test_the_default_is_the_criterions_own() -> None:
    def rules(**fields: Any) -> set[str | float]:
        model = mvpfx.prepare(ZOO["BERT"].model(), mvpfx.PruningConfig(**fields))
        return {mask.rule.score_init for mask in masks_of(model)}

    assert rules() == {"sensitivity"}
    assert rules(criterion="soft_movement") == rules(criterion="l0") == {"magnitude"}
    assert rules(overrides={"re:.*query": {"criterion": "l0"}}) == {"sensitivity", "magnitude"}
    assert rules(score_init="zero") == {"zero"}


@pytest.mark.parametrize("criterion", ["soft_movement", "l0"])
def test_criteria_that_cannot_measure_say_so(criterion: str) -> None:
    message = (
        f'criterion "{criterion}" cannot start from score_init="sensitivity". Use "magnitude", '
        '"zero" or a number.'
    )
    with raises(ValueError, message):
        mvpfx.PruningConfig(criterion=criterion, score_init="sensitivity")
    config = mvpfx.PruningConfig(
        score_init="sensitivity", overrides={"re:.*query": {"criterion": criterion}}
    )
    with raises(ValueError, message):
        mvpfx.prepare(ZOO["BERT"].model(), config)


def test_criteria_without_learned_scores_do_not_care() -> None:
    for name in criteria.names():
        if not criteria.find(name).learned:
            mvpfx.PruningConfig(criterion=name, score_init="sensitivity")


@pytest.mark.parametrize("stop", [2, 6], ids=["measuring", "learning"])
def test_a_resumed_run_is_the_same(stop: int, tmp_path: Path) -> None:
    whole = Loop()
    for _ in range(stop):
        whole.step()
    state = copy.deepcopy([x.state_dict() for x in (whole.stack, whole.optimizer, whole.scheduler)])
    resumed = Loop()
    for part, saved in zip(
        (resumed.stack, resumed.optimizer, resumed.scheduler), state, strict=True
    ):
        part.load_state_dict(saved)
    for _ in range(12 - stop):
        whole.step()
        resumed.step()
    for one, other in zip(whole.masks, resumed.masks, strict=True):
        assert torch.equal(one.require_scores(), other.require_scores())
        assert torch.equal(one.kept(), other.kept())


def test_experts_are_ranked_each_by_itself() -> None:
    from mvpfx.site import Site
    from tests.toy_masks import rule

    weight = torch.nn.Parameter(values(3, 4, 6))
    site = Site("experts.weight", (3, 4, 6), 1, parts=3)
    mask = Mask(site, weight, rule(score_init="sensitivity", density=0.5))
    mask.plan = PLAN
    sums = values(12, 6, seed=5).abs()
    sums[4:8] = 0.0  # an expert that was never asked
    with torch.no_grad():
        mask.require_scores().copy_(sums)
        mask.criterion.rank(mask, None)
    found = mask.require_scores().detach().chunk(3)
    torch.testing.assert_close(found[0], rank(sums[:4]) * 6)
    torch.testing.assert_close(found[1], rank(mask.unit_weights()[4:8]) * 6)


def test_the_optimizer_knows_the_scores_while_they_are_measured() -> None:
    loop = Loop()
    loop.step()
    for mask in loop.masks:
        scores = mask.require_scores()
        assert int(loop.optimizer.state[scores]["step"]) == 1, "checkpoints need a state"
        assert not loop.optimizer.state[scores]["exp_avg"].any()
