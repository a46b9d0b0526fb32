"""Every criterion in a whole model: training, checkpoints and conversion; and what is its own."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx import criteria
from tests.toy_masks import Stack, make_mask, raises, values
from tests.training import assert_equal, masks_of
from tests.zoo import ZOO
from tests.zoo.entry import loss, output

OBSERVING = [name for name in criteria.names() if criteria.find(name).observes == "scores"]


def prepared(criterion: str, **fields: Any) -> Any:
    return mvpfx.prepare(
        ZOO["BERT"].model(),
        mvpfx.PruningConfig(
            criterion=criterion, schedule=mvpfx.LinearSchedule(), density=0.4, **fields
        ),
    )


class Loop:
    """A plain training loop that can be stopped and resumed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scheduler = mvpfx.SparsityScheduler(model, total_steps=6)
        self.optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3))
        self.parts: dict[str, Any] = {"optimizer": self.optimizer, "scheduler": self.scheduler}

    def run(self, steps: int) -> Any:
        for _ in range(steps):
            batch = ZOO["BERT"].batch(0)
            (loss(self.model(**batch)) + mvpfx.penalty(self.model)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self.model


@pytest.mark.parametrize("criterion", criteria.names())
def test_training_moves_the_masks_and_converting_keeps_the_function(criterion: str) -> None:
    torch.manual_seed(0)
    model = Loop(prepared(criterion, penalty_lambda=1.0)).run(6).eval()
    batch = ZOO["BERT"].batch(0)
    if all(mask.density is not None for mask in masks_of(model)):
        kept = sum(int(mask.kept().sum()) for mask in masks_of(model))
        assert kept == sum(round(0.4 * mask.units) for mask in masks_of(model))
    small = mvpfx.convert(model, example_inputs=batch)
    assert_equal(output(small(**batch)), output(model(**batch)))
    assert not [name for name, _ in small.named_parameters() if "scores" in name]


@pytest.mark.parametrize("criterion", criteria.names())
def test_a_resumed_run_is_the_same(criterion: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = Loop(prepared(criterion))
    whole.run(3)
    mvpfx.save_checkpoint(tmp_path / "checkpoint-3", whole.model, **whole.parts)
    wanted = whole.run(3)
    resumed = Loop(prepared(criterion))
    mvpfx.load_checkpoint(tmp_path / "checkpoint-3", resumed.model, **resumed.parts)
    found = resumed.run(3)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    for one, other in zip(masks_of(found), masks_of(wanted), strict=True):
        assert torch.equal(one.mask(), other.mask())


@pytest.mark.parametrize("criterion", OBSERVING)
def test_accumulated_batches_count_as_one(criterion: str) -> None:
    stacks = [Stack(values(6, 8), values(4, 6), criterion=criterion) for _ in range(2)]
    for stack, parts in zip(stacks, (1, 4), strict=True):
        scheduler = mvpfx.SparsityScheduler(stack, total_steps=3)
        optimizer = torch.optim.SGD(mvpfx.parameter_groups(stack, lr=0.1, weight_decay=0.0))
        for step in range(3):
            for batch in values(8, 8, seed=step).chunk(parts):
                (stack(batch).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for one, other in zip(*(stack.mask_list for stack in stacks), strict=True):
        torch.testing.assert_close(one.require_scores(), other.require_scores())
        assert one.require_scores().min() >= 0 and one.require_scores().max() > 0


@pytest.mark.parametrize("criterion", OBSERVING)
def test_an_optimizer_without_the_scores_is_an_error(criterion: str) -> None:
    stack = Stack(values(4, 4), criterion=criterion)
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=2)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = torch.optim.SGD(stack.weights.parameters(), lr=0.1)
    stack(values(2, 4)).sum().backward()
    other.step()
    message = (
        f"the optimizer holds stack.0.weight and not its scores, whose gradients {criterion} "
        "accumulates. Make it with torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...))."
    )
    with raises(ValueError, message):
        optimizer.step()
    del scheduler
    gc.collect()
    optimizer.step()


@pytest.mark.parametrize("criterion", OBSERVING)
def test_the_optimizer_leaves_observed_scores_alone(criterion: str) -> None:
    stack = Stack(values(4, 4), criterion=criterion)
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=2)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(stack, lr=0.1, score_lr=10.0))
    (mask,) = stack.mask_list
    with torch.no_grad():
        stack(values(2, 4))
    optimizer.step()
    scheduler.step()
    assert not mask.require_scores().any(), "without a gradient nothing is observed"
    stack(values(2, 4)).sum().backward()
    gradient = mask.require_scores().grad
    assert gradient is not None
    wanted = copy.deepcopy(mask)
    with torch.no_grad():
        wanted.criterion.observe(wanted, gradient)
    optimizer.step()
    assert mask.require_scores().grad is None
    assert torch.equal(mask.require_scores(), wanted.require_scores())


def test_random_scores_depend_on_seed_and_site_alone() -> None:
    def scores(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(len(name) + seed)
        options = {"seed": seed}
        mask, _ = make_mask(values(8, 8), name=name, criterion="random", criterion_options=options)
        return mask.require_scores()

    assert torch.equal(scores("ffn", 0), scores("ffn", 0))
    assert not torch.equal(scores("ffn", 0), scores("ffn", 1))
    assert not torch.equal(scores("ffn", 0), scores("out", 0))


def test_l0_draws_in_training_and_is_fixed_in_evaluation() -> None:
    mask, weight = make_mask(values(32, 32), criterion="l0", score_init="zero")
    assert not torch.equal(mask(weight), mask(weight))
    mask.eval()
    assert torch.equal(mask(weight), mask(weight))
    torch.testing.assert_close(mask(weight), weight * (0.9 * 1.2 - 0.1))
    with torch.no_grad():
        mask.require_scores()[0] = -3.0
        mask.require_scores()[1] = 3.0
    assert not mask.kept()[0].any() and mask.kept()[1:].all()
    assert torch.equal(mask(weight)[1], weight[1]), "an open gate multiplies by 1"


@pytest.mark.parametrize(
    ("score_init", "lowest", "highest"),
    [("zero", 2.197, 2.197), (0.5, 0.5, 0.5), ("magnitude", 1.197, 3.197)],
)
def test_first_scores_of_l0(score_init: Any, lowest: float, highest: float) -> None:
    mask, weight = make_mask(values(64, 64), criterion="l0", score_init=score_init)
    scores = mask.require_scores().detach()
    assert float(scores.min()) == pytest.approx(lowest, abs=2e-2)
    assert float(scores.max()) == pytest.approx(highest, abs=2e-2)
    if score_init == "magnitude":
        order = weight.detach().abs().flatten().argsort()
        assert (scores.flatten()[order].diff() > -1e-6).all()
