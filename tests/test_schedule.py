"""Schedules: the paper's formula, bounds, and what does not fit."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvpfx.schedule import (
    ConstantSchedule,
    CubicSchedule,
    LinearSchedule,
    RampSchedule,
    Schedule,
    from_dict,
)
from tests import reference
from tests.toy_masks import raises

RAMPS: list[type[RampSchedule]] = [CubicSchedule, LinearSchedule]


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
    [CubicSchedule(), CubicSchedule(5, 0.1), LinearSchedule(0.0, 3), ConstantSchedule()],
    ids=str,
)
def test_round_trip(schedule: Schedule) -> None:
    assert from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            {"name": "quartic"},
            ValueError,
            "schedule 'quartic' is unknown. Use 'cubic', 'linear', 'constant'.",
        ),
        ({}, ValueError, "schedule None is unknown. Use 'cubic', 'linear', 'constant'."),
        (
            {"name": "cubic", "warm": 1},
            ValueError,
            "schedule 'cubic' has no option 'warm'. It has warmup, cooldown.",
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
