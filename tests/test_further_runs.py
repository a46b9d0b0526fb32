"""A model that was pruned is trained on: nothing that was pruned comes back without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import mvpfx
from mvpfx.hf import PruningTrainer
from tests.models import build

STEPS = 6
FIELDS: dict[str, dict[str, Any]] = {
    "density": {"density": 0.25},
    "global": {"density": 0.25, "scope": "global"},
    "cuts": {"density": 0.25, "schedule": mvpfx.StepSchedule(2)},
    "threshold": {"criterion": "soft_movement", "threshold": 0.5, "penalty_lambda": 1.0},
}


def pruned(steps: int = STEPS, **fields: Any) -> tuple[nn.Module, mvpfx.SparsityScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    mvpfx.prepare(model, mvpfx.PruningConfig(**fields))
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    train(model, scheduler, steps)
    return model, scheduler


def train(model: nn.Module, scheduler: mvpfx.SparsityScheduler, steps: int) -> None:
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(model, lr=1e-2))
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean() + mvpfx.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def density(model: nn.Module) -> float:
    masks = mvpfx.masks(model).values()
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@pytest.mark.parametrize("steps", [STEPS, STEPS - 1], ids=["ended", "half-way"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_a_new_schedule_brings_nothing_back(fields: dict[str, Any], steps: int) -> None:
    model, _ = pruned(steps, **fields)
    further = mvpfx.SparsityScheduler(model, STEPS)
    with pytest.raises(ValueError, match=r"0.weight came to (.|\n)*keep=True"):
        further.step()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_a_schedule_that_keeps_stays_where_the_masks_are(fields: dict[str, Any]) -> None:
    model, _ = pruned(**fields)
    before, masks = density(model), mvpfx.masks(model)
    further = mvpfx.SparsityScheduler(model, STEPS, keep=True)
    assert all(torch.equal(mask, masks[name]) for name, mask in mvpfx.masks(model).items())
    train(model, further, STEPS)
    assert abs(density(model) - before) < (0.3 if "threshold" in fields else 1e-9)


def test_a_new_start_on_purpose() -> None:
    model, _ = pruned(density=0.25)
    further = mvpfx.SparsityScheduler(model, STEPS, keep=False)
    assert further.density == 1
    further.step()


def test_a_run_that_is_resumed() -> None:
    model, scheduler = pruned(3, density=0.25)
    again = mvpfx.SparsityScheduler(model, STEPS)
    again.load_state_dict(scheduler.state_dict())
    again.step()
    assert again.step_count == 4


def test_the_state_of_a_run_that_keeps() -> None:
    model, _ = pruned(density=0.25)
    further = mvpfx.SparsityScheduler(model, STEPS, keep=True)
    further.step()
    state = further.state_dict()
    again = mvpfx.SparsityScheduler(model, STEPS, keep=True)
    again.load_state_dict(state)
    assert again.step_count == 1 and abs(density(model) - 0.25) < 0.01
    with pytest.raises(ValueError, match=r"keep=True\) to resume it"):
        mvpfx.SparsityScheduler(model, STEPS, keep=False).load_state_dict(state)


def test_a_part_of_a_prepared_model_is_not_prepared_again() -> None:
    model, _ = pruned(density=0.25)
    with pytest.raises(ValueError, match=r"^Linear is part of a model that is prepared already"):
        mvpfx.prepare(model.get_submodule("0"), density=0.25)


def test_a_constant_schedule_starts_where_it_ended() -> None:
    model, _ = pruned(density=0.25, schedule=mvpfx.ConstantSchedule())
    mvpfx.SparsityScheduler(model, STEPS).step()


def test_a_second_train_of_the_trainer_keeps_the_density(tmp_path: Path) -> None:
    model, batch = build("bert")
    rows = [{name: value[0] for name, value in batch.items()}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    config = mvpfx.PruningConfig(density=0.25, score_init="magnitude")
    trainer = PruningTrainer(model, arguments, train_dataset=rows, config=config)
    trainer.train()
    assert abs(density(model) - 0.25) < 0.01
    trainer.train()
    assert abs(density(model) - 0.25) < 0.01
