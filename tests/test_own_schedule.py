"""Schedules of one's own: their checkpoints are read again, or `prepare` refuses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.schedule import RampSchedule


@dataclass(frozen=True)
class Quadratic(RampSchedule):
    name: ClassVar[str] = "quadratic of a test"
    power: float = 2.0

    def _value(self, passed: float, initial: float, final: float) -> float:
        return final + (initial - final) * (1 - passed) ** self.power


@dataclass(frozen=True)
class Steeper(Quadratic):
    name: ClassVar[str] = "steeper of a test"


class Unnamed(Quadratic):
    pass


@dataclass(frozen=True)
class Impostor(Quadratic):
    name: ClassVar[str] = "cubic"


@dataclass(frozen=True)
class Holding(Quadratic):
    name: ClassVar[str] = "holds what JSON cannot"
    what: Any = torch.float32


class Plain(mvpfx.ConstantSchedule):
    name: ClassVar[str] = "no dataclass"

    def __init__(self, hidden: int) -> None:
        object.__setattr__(self, "hidden", hidden)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return 0


def new(schedule: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return mvpfx.prepare(model, mvpfx.PruningConfig(density=0.5, schedule=schedule))


@pytest.mark.parametrize("schedule", [Quadratic(), Quadratic(power=3.0), Steeper(warmup=1)])
def test_a_checkpoint_is_read_again(schedule: Any, tmp_path: Path) -> None:
    model = new(schedule)
    scheduler = mvpfx.SparsityScheduler(model, 10)
    for _ in range(4):
        scheduler.step()
    mvpfx.save_checkpoint(tmp_path / "c", model, scheduler=scheduler)
    again = new(mvpfx.pruning_config(tmp_path / "c").schedule)
    other = mvpfx.SparsityScheduler(again, 10)
    mvpfx.load_checkpoint(tmp_path / "c", again, scheduler=other)
    assert (other.step_count, other.density) == (4, scheduler.density)
    x = torch.randn(3, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("schedule", "lacks"),
    [
        (Unnamed(), "Unnamed has no name of its own"),
        (Impostor(), "Impostor has the name of CubicSchedule"),
        (Holding(), "Holding has options that JSON cannot hold or that it does not take: "),
        (Plain(3), "Plain has options that JSON cannot hold or that it does not take: "),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_could_not_be_read_is_refused_before_training(schedule: Any, lacks: str) -> None:
    with pytest.raises(ValueError) as caught:
        new(schedule)
    assert str(caught.value).startswith(lacks)
    assert "Make it a frozen dataclass" in str(caught.value)
