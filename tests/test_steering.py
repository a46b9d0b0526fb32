"""Steering: soft criteria end at the density that was asked for, whatever the task gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.steering import Pull
from tests.toy_masks import Stack, raises, values
from tests.trainers import logged, of, pruning_trainer, same_state
from tests.training import masks_of
from tests.zoo import ZOO
from tests.zoo.entry import loss


class Steered:
    """A plain loop on a tiny model of the zoo, with batches that take turns and linear decay."""

    def __init__(self, name: str, total_steps: int, score_lr: float, **fields: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = mvpfx.prepare(ZOO[name].model(), mvpfx.PruningConfig(**fields))
        self.batches = [ZOO[name].batch(i) for i in range(2)]
        self.scheduler = mvpfx.SparsityScheduler(self.model, total_steps)
        self.optimizer = torch.optim.AdamW(
            mvpfx.parameter_groups(self.model, lr=1e-4, score_lr=score_lr)
        )
        self.decay = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_steps)
        self.parts: dict[str, Any] = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "lr_scheduler": self.decay,
        }

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = self.batches[self.scheduler.step_count % 2]
            (loss(self.model(**batch)) + mvpfx.penalty(self.model)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.decay.step()
            self.scheduler.step()

    def density(self) -> float:
        masks = masks_of(self.model)
        return sum(int(mask.kept().sum()) for mask in masks) / sum(mask.units for mask in masks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "criterion", "steps", "score_lr", "density"),
    [
        ("BERT", "soft_movement", 600, 1e-2, 0.10),
        ("BERT", "soft_movement", 300, 1e-1, 0.10),
        ("BERT", "soft_movement", 600, 3e-2, 0.03),
        ("BERT", "l0", 600, 1e-1, 0.10),
        ("BERT", "l0", 300, 1e-1, 0.25),
        ("Llama", "soft_movement", 600, 3e-2, 0.10),
        ("ViT", "soft_movement", 600, 1e-2, 0.50),
    ],
)
def test_the_density_at_the_end_is_within_two_percent_of_what_was_asked(
    name: str, criterion: str, steps: int, score_lr: float, density: float
) -> None:
    run = Steered(name, steps, score_lr, criterion=criterion, density=density, scope="global")
    run.run(steps)
    assert run.density() == pytest.approx(density, rel=0.02)
    assert run.scheduler.density == pytest.approx(density)


@pytest.mark.parametrize(("criterion", "steps"), [("soft_movement", 100), ("l0", 200)])
def test_a_short_run_ends_close_too(criterion: str, steps: int) -> None:
    run = Steered("BERT", steps, 1e-1, criterion=criterion, density=0.3, scope="global")
    run.run(steps)
    assert run.density() == pytest.approx(0.3, rel=0.05)


def test_in_local_scope_each_site_is_steered_by_itself() -> None:
    run = Steered("BERT", 150, 1e-1, criterion="soft_movement", density=0.4)
    run.run(150)
    factors = {mask.penalty_lambda for mask in masks_of(run.model)}
    assert len(factors) == len(masks_of(run.model))
    assert all(mask.density_now == pytest.approx(0.4, rel=0.3) for mask in masks_of(run.model))


def test_a_resumed_run_is_steered_the_same(tmp_path: Any) -> None:
    fields: dict[str, Any] = {"criterion": "soft_movement", "density": 0.3, "scope": "global"}
    whole = Steered("BERT", 20, 1e-1, **fields)
    whole.run(10)
    mvpfx.save_checkpoint(tmp_path / "checkpoint-10", whole.model, **whole.parts)
    whole.run(10)
    resumed = Steered("BERT", 20, 1e-1, **fields)
    mvpfx.load_checkpoint(tmp_path / "checkpoint-10", resumed.model, **resumed.parts)
    assert masks_of(resumed.model)[0].penalty_lambda
    resumed.run(10)
    state = whole.scheduler.state_dict()
    assert resumed.scheduler.state_dict() == state == json.loads(json.dumps(state))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_trainer_that_resumes_steers_the_same(tmp_path: Any) -> None:
    config = mvpfx.PruningConfig(criterion="soft_movement", density=0.3, scope="global")
    changed: dict[str, Any] = {"options": {"config": config}, "max_steps": 6, "save_steps": 3}
    changed["eval_strategy"] = "no"
    run = pruning_trainer("BERT", tmp_path, **changed)
    run.train()
    resumed = pruning_trainer("BERT", tmp_path, **changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(of(run), of(resumed))
    assert logged(run, "penalty") == logged(resumed, "penalty")
    trainers: list[Any] = [run, resumed]
    schedules = [trainer.pruning.scheduler.state_dict() for trainer in trainers]
    assert schedules[0] == schedules[1] and schedules[0]["steering"][0]["factor"] != 0


def test_sharded_scores_cannot_be_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(values(4, 4), criterion="soft_movement")
    (mask,) = stack.mask_list
    monkeypatch.setattr(type(mask), "shard", property(lambda mask: mask.scores))
    message = (
        "the scores of stack.0.weight are sharded over ranks, and a penalty is steered by whole "
        "scores. Use DDP, or prepare with a number as penalty_lambda."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(stack, total_steps=6)


def test_a_given_factor_is_not_steered() -> None:
    stack = Stack(values(4, 4), criterion="soft_movement", penalty_lambda=3.0)
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=2)
    assert set(scheduler.state_dict()) == {"step_count", "total_steps"}
    assert scheduler.density is None


def test_the_table_shows_what_is_asked() -> None:
    fields: dict[str, Any] = {"criterion": "soft_movement", "density": 0.3}
    run = Steered("BERT", 4, 1e-1, schedule=mvpfx.ConstantSchedule(), **fields)
    table = mvpfx.sparsity_table(run.model)
    assert "0.3000" in table and "tau" not in table


def test_pull_follows_the_distance_and_adapts_its_gain() -> None:
    pull = Pull()
    pull.measure(4.0)
    assert pull.scale() == pytest.approx(2.0)
    pull.steer(0.2, 0.0, 0.0, horizon=20, reference=0.5)
    assert pull.factor == pytest.approx(10.0 * 0.2 * 2.0 / 0.5)
    pull.measure(4.0)
    pull.steer(0.2, 0.0, 0.0, horizon=20, reference=0.5)
    assert pull.gain > 10.0, "scores that stand still are pulled more"
    gain = pull.gain
    pull.steer(0.2, -0.15, 0.0, horizon=20, reference=0.5)
    assert pull.gain < gain, "scores that fall fast are pulled less"
    pull.steer(0.2, 0.0, 0.5, horizon=20, reference=0.5)
    assert pull.gain > gain / 1.03, "scores that the target runs away from are pulled more"
    pull.steer(-5.0, 0.0, 0.0, horizon=20, reference=0.5)
    assert pull.factor == pytest.approx(-10.0 * 2.0 / 0.5), "at most ten times the task"
    assert Pull().scale() == 0.0
