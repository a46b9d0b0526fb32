"""Schedules: the paper's formula, bounds, and what does not fit."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvpfx.cut_schedule import OneShotSchedule, StepSchedule
from mvpfx.saved_schedule import from_dict
from mvpfx.schedule import (
    ConstantSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    RampSchedule,
    Schedule,
)
from tests import reference
from tests.toy_masks import raises

RAMPS: list[type[RampSchedule]] = [
    CubicSchedule,
    LinearSchedule,
    ExponentialSchedule,
    StepSchedule,
]


@given(
    total=st.integers(1, 2000),
    parts=st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)),
    final=st.floats(0.01, 1),
)
@pytest.mark.parametrize("kind", RAMPS)
def test_monotone_and_bounded(
    kind: type[RampSchedule], total: int, parts: tuple[float, float], final: float
) -> None:
    schedule = kind(*parts)
    path = [schedule(step, total, 1.0, final) for step in range(total + 1)]
    assert path[0] == 1.0 == schedule.start(1.0, final)
    assert path[-1] == final
    assert all(final <= later <= earlier for earlier, later in pairwise(path))


@given(total=st.integers(10, 500), final=st.floats(0.01, 0.99), warmup=st.integers(0, 4))
def test_cubic_is_the_papers(total: int, final: float, warmup: int) -> None:
    schedule = CubicSchedule(warmup=warmup, cooldown=5)
    for step in range(total + 1):
        expected = reference.cubic(step, total, warmup, 5, 1.0, final)
        assert schedule(step, total, 1.0, final) == pytest.approx(expected, abs=1e-12)


def test_a_threshold_rises() -> None:
    linear = LinearSchedule(warmup=0, cooldown=0)
    assert [linear(step, 4, 0.0, 0.1) for step in range(5)] == pytest.approx(
        [0, 0.025, 0.05, 0.075, 0.1]
    )


def test_constant_is_there_at_once() -> None:
    schedule = ConstantSchedule()
    schedule.check(1)
    assert schedule.start(1.0, 0.2) == schedule(0, 1, 1.0, 0.2) == 0.2


def test_fractions_and_steps() -> None:
    assert CubicSchedule(warmup=0.29, cooldown=0.1).resolve(100) == (29, 10)
    assert CubicSchedule(warmup=0.5, cooldown=0.49).resolve(3) == (1, 1)
    assert CubicSchedule(warmup=7, cooldown=0.5).resolve(100) == (7, 50)
    assert CubicSchedule(warmup=0.1, cooldown=0.2).resolve(1) == (0, 0)


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (
            (0.5, 0.5),
            ValueError,
            "warmup=0.5 and cooldown=0.5 take 1 of the run, which leaves no step to prune in. "
            "Make them sum to less than 1.",
        ),
        (
            (0.1, 1.0),
            ValueError,
            "cooldown must be a fraction of the run in [0, 1) as a float, "
            "or a number of optimizer steps as an int; found 1.0.",
        ),
        (
            (-1, 0.1),
            ValueError,
            "warmup must be a fraction of the run in [0, 1) as a float, "
            "or a number of optimizer steps as an int; found -1.",
        ),
        ((float("nan"), 0.1), ValueError, "warmup must be finite; found nan."),
        ((True, 0.1), TypeError, "warmup must be a number; found True (bool)."),
        ((0.1, "2"), TypeError, "cooldown must be a number; found '2' (str)."),
    ],
)
def test_bad_parts(
    kind: type[RampSchedule], parts: tuple[float, float], error: type[Exception], message: str
) -> None:
    with raises(error, message):
        kind(*parts)


@pytest.mark.parametrize("kind", RAMPS)
def test_warmup_and_cooldown_of_the_whole_run(kind: type[RampSchedule]) -> None:
    message = (
        "a warm-up of 60 and a cool-down of 40 steps leave no step to prune in: the run has "
        "total_steps=100. Train longer, or make warmup and cooldown of the schedule shorter."
    )
    with raises(ValueError, message):
        kind(warmup=60, cooldown=0.4).check(100)


@pytest.mark.parametrize(
    "schedule",
    [
        CubicSchedule(),
        CubicSchedule(5, 0.1, freeze=True),
        LinearSchedule(0.0, 3),
        ExponentialSchedule(),
        StepSchedule(cuts=3, rewind_to=0.05),
        OneShotSchedule(at=100, rewind_to=0, freeze=True),
        ConstantSchedule(),
    ],
    ids=str,
)
def test_round_trip(schedule: Schedule) -> None:
    assert from_dict(schedule.to_dict()) == schedule


ALL = "'cubic', 'linear', 'exponential', 'step', 'one_shot', 'constant'"
OR = ", or import the module that defines it first."


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            {"name": "quartic"},
            ValueError,
            f"schedule 'quartic' is unknown. Use {ALL}{OR}",
        ),
        (
            {},
            ValueError,
            f"schedule None is unknown. Use {ALL}{OR}",
        ),
        (
            {"name": "cubic", "warm": 1},
            ValueError,
            "schedule 'cubic' has no option 'warm'. It has warmup, cooldown, freeze, cuts.",
        ),
        (
            {"name": "constant", "warmup": 1},
            ValueError,
            "schedule 'constant' has no option 'warmup'. It has none.",
        ),
        (["cubic"], TypeError, "a schedule must be an object with a name; found ['cubic']."),
    ],
)
def test_bad_data(data: object, error: type[Exception], message: str) -> None:
    with raises(error, message):
        from_dict(data)


def test_exponential_multiplies_by_the_same_factor() -> None:
    schedule = ExponentialSchedule(warmup=2, cooldown=2)
    path = [schedule(step, 14, 1.0, 0.1) for step in range(2, 13)]
    factors = [later / earlier for earlier, later in pairwise(path)]
    assert factors == pytest.approx([0.1**0.1] * 10)


@given(total=st.integers(20, 400), cuts=st.integers(1, 10), final=st.floats(0.01, 0.9))
def test_steps_cut_as_often_as_asked_by_the_same_share(total: int, cuts: int, final: float) -> None:
    schedule = StepSchedule(warmup=3, cooldown=4, cuts=cuts)
    schedule.check(total)
    path = [schedule(step, total, 1.0, final) for step in range(total + 1)]
    falls = [later / earlier for earlier, later in pairwise(path) if later != earlier]
    assert falls == pytest.approx([final ** (1 / cuts)] * cuts)
    assert path[total - 4] == final < path[total - 5]


def test_one_shot_cuts_once() -> None:
    schedule = OneShotSchedule(at=0.25)
    assert [schedule(step, 8, 1.0, 0.1) for step in range(9)] == [1.0, 1.0, *([0.1] * 7)]
    assert OneShotSchedule(at=0).start(1.0, 0.1) == 0.1


def test_when_weights_are_remembered_and_restored() -> None:
    steps = StepSchedule(warmup=2, cooldown=2, cuts=3, rewind_to=1)
    at = {step: steps.rewinds(step, 10) for step in range(11)}
    assert {step: what for step, what in at.items() if what} == {
        1: "remember",
        4: "restore",
        6: "restore",
        8: "restore",
    }
    once = OneShotSchedule(at=5, rewind_to=0.2)
    assert [once.rewinds(step, 10) for step in (2, 5, 6)] == ["remember", "restore", None]
    assert not StepSchedule().remembers and StepSchedule().rewinds(1, 10) is None


def test_when_masks_are_frozen() -> None:
    assert [CubicSchedule(1, 3, freeze=True).frozen(step, 10) for step in (6, 7, 10)] == [
        False,
        True,
        True,
    ]
    assert not CubicSchedule(1, 3).frozen(10, 10)
    assert [OneShotSchedule(at=0, freeze=True).frozen(step, 10) for step in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            StepSchedule(warmup=2, cooldown=2, cuts=7),
            "7 cuts need as many steps between warm-up and cool-down, and a run of total_steps=10 "
            "has 6 there. Train longer, or make fewer cuts.",
        ),
        (
            StepSchedule(warmup=2, cooldown=2, cuts=3, rewind_to=4),
            "rewind_to is step 4, and the first cut is at step 4. Weights can only go back to "
            "before it.",
        ),
        (
            OneShotSchedule(at=10),
            "the cut is at step 10, and the run has total_steps=10. Train longer, or cut earlier.",
        ),
        (
            OneShotSchedule(at=0.5, rewind_to=5),
            "rewind_to is step 5, and the first cut is at step 5. Weights can only go back to "
            "before it.",
        ),
    ],
    ids=str,
)
def test_cuts_that_do_not_fit(schedule: Schedule, message: str) -> None:
    with raises(ValueError, message):
        schedule.check(10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StepSchedule(cuts=0), ValueError, "cuts must be at least 1; found 0."),
        (
            lambda: StepSchedule(rewind_to=-1),
            ValueError,
            "rewind_to must be a fraction of the run in [0, 1) as a float, or a number of "
            "optimizer steps as an int; found -1.",
        ),
        (lambda: OneShotSchedule(at="1"), TypeError, "at must be a number; found '1' (str)."),  # pyright: ignore[reportArgumentType]
        (lambda: CubicSchedule(freeze=1), TypeError, "freeze must be True or False; found 1."),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_options(make: Any, error: type[Exception], message: str) -> None:
    with raises(error, message):
        make()
