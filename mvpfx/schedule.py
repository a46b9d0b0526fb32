"""Schedules: optimizer step -> value, as pure functions.

A schedule knows neither the model nor what it moves: the same one takes the density from 1 to its
final value and the threshold of soft movement from 0 to its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from mvpfx.checks import as_count, as_number

Rewind = Literal["remember", "restore"]
"""Weights are remembered as they are, or put back to what was remembered."""


class Schedule(ABC):
    """A pure function of the optimizer step: from `initial` to `final` in `total_steps`."""

    name: ClassVar[str]

    def frozen(self, step: int, total_steps: int) -> bool:
        """Whether the masks stay what they are from this step on, whatever scores do."""
        return False

    def rewinds(self, step: int, total_steps: int) -> Rewind | None:
        """What happens to the weights after `step` optimizer steps: mostly nothing."""
        return None

    @property
    def freezes(self) -> bool:
        """Whether `frozen` is ever true, so that masks have to be stored."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether `rewinds` ever says anything, so that weights have to be stored."""
        return False

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

    def moves(self, total_steps: int) -> list[int]:
        """Optimizer steps after which the value is another one than before.

        >>> CubicSchedule(warmup=4, cooldown=2, cuts=2).moves(10)
        [6, 8]
        """
        values = [self(step, total_steps, 1.0, 0.0) for step in range(total_steps + 1)]
        return [step for step, (one, other) in enumerate(pairwise(values), 1) if one != other]

    def to_dict(self) -> dict[str, object]:
        """Name and options, fit for JSON.

        >>> CubicSchedule(warmup=100).to_dict()
        {'name': 'cubic', 'warmup': 100, 'cooldown': 0.2, 'freeze': False, 'cuts': None}
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
        freeze: whether the masks stay as they are in the cool-down, while weights still learn. By
            default only how much is kept is fixed then, and what is kept still follows the scores.
        cuts: in how many steps of equal length the ramp falls, the last one where the cool-down
            begins; None for one at each optimizer step. (The `dt` of Eq. 5 in Sanh et al. 2020 is
            the length of such a step.)

    Raises:
        TypeError: if either is not a number, `freeze` no bool, or `cuts` no whole number.
        ValueError: if either is negative, together they leave no step to ramp in, or there is no
            cut.
    """

    warmup: float | int = 0.1
    cooldown: float | int = 0.2
    freeze: bool = False
    cuts: int | None = None

    def __post_init__(self) -> None:
        if self.cuts is not None:
            as_count(self.cuts, "cuts")
        check_part("warmup", self.warmup)
        check_part("cooldown", self.cooldown)
        check_flag("freeze", self.freeze)
        if isinstance(self.warmup, float) and isinstance(self.cooldown, float):
            whole = self.warmup + self.cooldown
            if whole >= 1:
                raise ValueError(
                    f"warmup={self.warmup!r} and cooldown={self.cooldown!r} take {whole:.4g} of "
                    "the run, which leaves no step to prune in. Make them sum to less than 1."
                )

    @abstractmethod
    def _value(self, passed: float, initial: float, final: float) -> float:
        """The value where the share `passed` of the ramp's steps is behind, in [0, 1)."""

    def resolve(self, total_steps: int) -> tuple[int, int]:
        """Warm-up and cool-down in optimizer steps, for a run of `total_steps`.

        >>> CubicSchedule(warmup=0.1, cooldown=50).resolve(1000)
        (100, 50)

        Raises:
            ValueError: if they take the whole run.
        """
        warmup, cooldown = (whole_steps(part, total_steps) for part in (self.warmup, self.cooldown))
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
        passed = (step - warmup) / (total_steps - cooldown - warmup)
        if self.cuts is not None:
            passed = int(passed * self.cuts + 1e-9) / self.cuts
        return self._value(passed, initial, final)

    def frozen(self, step: int, total_steps: int) -> bool:
        """In the cool-down, if `freeze` says so."""
        return self.freeze and step >= total_steps - self.resolve(total_steps)[1]

    @property
    def freezes(self) -> bool:
        """As `freeze` says."""
        return self.freeze

    def start(self, initial: float, final: float) -> float:
        """`initial`: a ramp always starts there, with or without warm-up."""
        return initial

    def check(self, total_steps: int) -> None:
        """Fits where the ramp between warm-up and cool-down has a step for each cut.

        Raises:
            ValueError: if not.
        """
        room = total_steps - sum(self.resolve(total_steps))
        if self.cuts is not None and room < self.cuts:
            raise ValueError(
                f"{self.cuts} cuts need as many steps between warm-up and cool-down, and a run of "
                f"total_steps={total_steps} has {room} there. Train longer, or make fewer cuts."
            )


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

    def _value(self, passed: float, initial: float, final: float) -> float:
        return final + (initial - final) * (1 - passed) ** 3


@dataclass(frozen=True)
class LinearSchedule(RampSchedule):
    """The same step by step: `v(t) = v_f + (v_i - v_f) * (1 - (t - t_i) / (T - t_f - t_i))`.

    >>> linear = LinearSchedule(warmup=0.1, cooldown=0.2)
    >>> [round(linear(step, 1000, 1.0, 0.1), 3) for step in (0, 100, 450, 800, 1000)]
    [1.0, 1.0, 0.55, 0.1, 0.1]
    """

    name: ClassVar[str] = "linear"

    def _value(self, passed: float, initial: float, final: float) -> float:
        return final + (initial - final) * (1 - passed)


@dataclass(frozen=True)
class ExponentialSchedule(RampSchedule):
    """The same share of what is left, step by step: `v(t) = v_i * (v_f / v_i)^p`.

    `p` is the share of the ramp that is behind. A value that comes from 0 or goes there, such as a
    threshold, moves linearly.

    >>> exponential = ExponentialSchedule(warmup=0.1, cooldown=0.2)
    >>> [round(exponential(step, 1000, 1.0, 0.01), 3) for step in (0, 100, 450, 800, 1000)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    name: ClassVar[str] = "exponential"

    def _value(self, passed: float, initial: float, final: float) -> float:
        return geometric(passed, initial, final)


def geometric(passed: float, initial: float, final: float) -> float:
    """Between two values, at the share `passed` of the way; linear where one of them is 0.

    >>> round(geometric(0.5, 1.0, 0.01), 6), geometric(0.5, 0.0, 0.2)
    (0.1, 0.1)
    """
    if initial <= 0 or final <= 0:
        return initial + (final - initial) * passed
    value = initial * (final / initial) ** passed
    return min(max(value, min(initial, final)), max(initial, final))


def whole_steps(part: float | int, total_steps: int) -> int:
    """Optimizer steps that a part of a run has: a fraction rounded down, or steps as they are."""
    return math.floor(part * total_steps + 1e-9) if isinstance(part, float) else part


def check_part(field: str, value: object) -> None:
    """Make sure that an option is a part of a run.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, or a fraction that is not below 1.
    """
    number = as_number(value, field)
    if number < 0 or (isinstance(value, float) and number >= 1):
        raise ValueError(
            f"{field} must be a fraction of the run in [0, 1) as a float, "
            f"or a number of optimizer steps as an int; found {value!r}."
        )


def check_flag(field: str, value: object) -> None:
    """Make sure that an option is True or False.

    Raises:
        TypeError: if not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False; found {value!r}.")
