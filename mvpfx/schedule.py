"""Schedules: optimizer step -> value, as pure functions.

A schedule knows neither the model nor what it moves: the same one takes the density from 1 to its
final value and the threshold of soft movement from 0 to its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from mvpfx.checks import as_number


class Schedule(ABC):
    """A pure function of the optimizer step: from `initial` to `final` in `total_steps`."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, step: int, total_steps: int, initial: float, final: float) -> float:
        """Value after `step` optimizer steps of `total_steps`.

        Raises:
            ValueError: if the schedule does not fit into `total_steps`.
        """

    @abstractmethod
    def start(self, initial: float, final: float) -> float:
        """Value at step 0, which does not depend on the length of the run."""

    @abstractmethod
    def check(self, total_steps: int) -> None:
        """Make sure that the schedule fits into a run of `total_steps`.

        Raises:
            ValueError: if it does not.
        """

    def to_dict(self) -> dict[str, object]:
        """Name and options, fit for JSON.

        >>> CubicSchedule(warmup=100).to_dict()
        {'name': 'cubic', 'warmup': 100, 'cooldown': 0.2}
        """
        return {"name": self.name, **asdict(self)}  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The final value from the first step on.

    >>> [ConstantSchedule()(step, 10, 1.0, 0.25) for step in (0, 5, 10)]
    [0.25, 0.25, 0.25]
    """

    name: ClassVar[str] = "constant"

    def __call__(self, step: int, total_steps: int, initial: float, final: float) -> float:
        """`final`, at any step."""
        return final

    def start(self, initial: float, final: float) -> float:
        """`final`: there is no way to go."""
        return final

    def check(self, total_steps: int) -> None:
        """Fits any run."""


@dataclass(frozen=True)
class RampSchedule(Schedule):
    """Hold, ramp, hold; `_shape` says how the ramp falls. Use one of its subclasses.

    Attributes:
        warmup: how long the initial value is held; a float is a fraction of the run (rounded down
            to whole optimizer steps), an int is a number of optimizer steps.
        cooldown: the same, for the final value.

    Raises:
        TypeError: if either is not a number.
        ValueError: if either is negative, or together they leave no step to ramp in.
    """

    warmup: float | int = 0.1
    cooldown: float | int = 0.2

    def __post_init__(self) -> None:
        for field, value in (("warmup", self.warmup), ("cooldown", self.cooldown)):
            number = as_number(value, field)
            if number < 0 or (isinstance(value, float) and number >= 1):
                raise ValueError(
                    f"{field} must be a fraction of the run in [0, 1) as a float, "
                    f"or a number of optimizer steps as an int; found {value!r}."
                )
        if isinstance(self.warmup, float) and isinstance(self.cooldown, float):
            whole = self.warmup + self.cooldown
            if whole >= 1:
                raise ValueError(
                    f"warmup={self.warmup!r} and cooldown={self.cooldown!r} take {whole:.4g} of "
                    "the run, which leaves no step to prune in. Make them sum to less than 1."
                )

    @abstractmethod
    def _shape(self, left: float) -> float:
        """Share of the way still to go, given the share `left` of the ramp's steps."""

    def resolve(self, total_steps: int) -> tuple[int, int]:
        """Warm-up and cool-down in optimizer steps, for a run of `total_steps`.

        >>> CubicSchedule(warmup=0.1, cooldown=50).resolve(1000)
        (100, 50)

        Raises:
            ValueError: if they take the whole run.
        """
        warmup, cooldown = (
            math.floor(part * total_steps + 1e-9) if isinstance(part, float) else part
            for part in (self.warmup, self.cooldown)
        )
        if warmup + cooldown >= total_steps:
            raise ValueError(
                f"a warm-up of {warmup} and a cool-down of {cooldown} steps leave no step to prune "
                f"in: the run has total_steps={total_steps}. "
                "Train longer, or make warmup and cooldown of the schedule shorter."
            )
        return warmup, cooldown

    def __call__(self, step: int, total_steps: int, initial: float, final: float) -> float:
        """Eq. 5 of Sanh et al. 2020, see the class."""
        warmup, cooldown = self.resolve(total_steps)
        if step < warmup:
            return initial
        if step >= total_steps - cooldown:
            return final
        left = 1 - (step - warmup) / (total_steps - cooldown - warmup)
        return final + (initial - final) * self._shape(left)

    def start(self, initial: float, final: float) -> float:
        """`initial`: a ramp always starts there, with or without warm-up."""
        return initial

    def check(self, total_steps: int) -> None:
        """Fits where warm-up and cool-down are shorter than the run."""
        self.resolve(total_steps)


@dataclass(frozen=True)
class CubicSchedule(RampSchedule):
    """Fast at first, slow at the end: Sanh et al. 2020, Eq. 5.

    `v(t) = v_f + (v_i - v_f) * (1 - (t - t_i) / (T - t_f - t_i))^3` between the warm-up of `t_i`
    and the cool-down of `t_f` steps. (The paper prints `1 - (t - t_i - t_f) / (n dt)`, which does
    not start at `v_i`; its code computes this line.)

    >>> cubic = CubicSchedule(warmup=0.1, cooldown=0.2)
    >>> [round(cubic(step, 1000, 1.0, 0.1), 3) for step in (0, 100, 250, 450, 799, 800, 1000)]
    [1.0, 1.0, 0.537, 0.213, 0.1, 0.1, 0.1]
    """

    name: ClassVar[str] = "cubic"

    def _shape(self, left: float) -> float:
        return left**3


@dataclass(frozen=True)
class LinearSchedule(RampSchedule):
    """The same step by step: `v(t) = v_f + (v_i - v_f) * (1 - (t - t_i) / (T - t_f - t_i))`.

    >>> linear = LinearSchedule(warmup=0.1, cooldown=0.2)
    >>> [round(linear(step, 1000, 1.0, 0.1), 3) for step in (0, 100, 450, 800, 1000)]
    [1.0, 1.0, 0.55, 0.1, 0.1]
    """

    name: ClassVar[str] = "linear"

    def _shape(self, left: float) -> float:
        return left


_SCHEDULES: dict[str, type[CubicSchedule | LinearSchedule | ConstantSchedule]] = {
    kind.name: kind for kind in (CubicSchedule, LinearSchedule, ConstantSchedule)
}


def from_dict(data: object) -> Schedule:
    """The way back of `Schedule.to_dict`.

    Raises:
        TypeError: if `data` is not a mapping.
        ValueError: if its name is unknown, or an option is not one of this schedule's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a schedule must be an object with a name; found {data!r}.")
    options = {str(key): value for key, value in data.items()}
    name = options.pop("name", None)
    kind = _SCHEDULES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"schedule {name!r} is unknown. Use {', '.join(map(repr, _SCHEDULES))}.")
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"schedule {name!r} has no option {unknown[0]!r}. It has {', '.join(known) or 'none'}."
        )
    return kind(**options)  # pyright: ignore[reportArgumentType, reportCallIssue]
