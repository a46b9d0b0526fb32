"""Runs that are too short for what is asked of them say so, and why."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from mvpfx.cut_schedule import OneShotSchedule, StepSchedule
from mvpfx.schedule import ConstantSchedule, CubicSchedule, Schedule
from mvpfx.scheduler import SparsityScheduler
from tests.toy_masks import Stack, values


def said(total_steps: int, plan: Schedule | None = None, **fields: Any) -> list[str]:
    """Warnings of a run."""
    stack = Stack(values(4, 4), values(4, 4), plan=plan or CubicSchedule(), **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparsityScheduler(stack, total_steps)
    return [str(each.message) for each in caught]


def test_a_short_ramp_is_said_once_for_all_sites() -> None:
    assert said(100) == [
        "a run of total_steps=100 is too short for movement: its scores have 70 updates until the "
        "last cut, and need about 100 to tell units apart. Train for more steps, make warmup and "
        'cooldown of the schedule shorter, or use criterion="magnitude".'
    ]
    assert said(200) == []


def test_equal_scores_need_a_long_warm_up() -> None:
    assert said(2000, score_init="zero") == [
        "scores that start all equal (score_init='zero') have 201 updates before the first cut of "
        "a run of total_steps=2000, so noise chooses what goes. Use "
        'score_init="magnitude", or a warm-up of 1000 steps or more.'
    ]
    assert said(10000, score_init="zero") == []
    assert len(said(2000, score_init=1.5)) == 1
    assert said(2000, criterion="platon", score_init="zero") == [], "it does not start from there"


@pytest.mark.parametrize(
    ("plan", "few", "enough"),
    [
        (OneShotSchedule(at=0.5), 150, 220),
        (StepSchedule(cuts=2), 100, 300),
        (CubicSchedule(cuts=5), 100, 200),
        (ConstantSchedule(), 50, 100),
    ],
    ids=str,
)
def test_every_schedule(plan: Schedule, few: int, enough: int) -> None:
    assert len(said(few, plan)) == 1
    assert said(enough, plan) == []


@pytest.mark.parametrize("criterion", ["magnitude", "random", "ema_magnitude"])
def test_what_learns_no_scores_may_be_short(criterion: str) -> None:
    assert said(10, criterion=criterion) == []
