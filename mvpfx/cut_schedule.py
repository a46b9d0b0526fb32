"""Schedules that cut at single steps and train in between, as lottery tickets are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mvpfx.checks import as_count
from mvpfx.schedule import (
    RampSchedule,
    Rewind,
    Schedule,
    check_flag,
    check_part,
    geometric,
    whole_steps,
)


@dataclass(frozen=True)
class StepSchedule(RampSchedule):
    """Iterative pruning: train, cut, and so on, the same share of what is left at each cut.

    The `k`-th of `n` cuts, at the share `k / n` of the way from warm-up to cool-down, takes the
    value to `v_i * (v_f / v_i)^(k / n)`; the last one is where the cool-down begins.

    With `rewind_to`, masked weights are put back after each cut to what they were after that many
    optimizer steps (Frankle and Carbin 2019; to an early step instead of the first: Frankle et al.
    2020); to step 0 is to what they were when the model was prepared. Biases, norms, embeddings and
    the state of the optimizer stay as they are.

    >>> steps = StepSchedule(warmup=0.1, cooldown=0.3, cuts=2)
    >>> [round(steps(step, 100, 1.0, 0.25), 3) for step in (0, 39, 40, 69, 70, 100)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]

    Attributes:
        warmup, cooldown, freeze: as for all ramps.
        cuts: how many.
        rewind_to: step that weights go back to; a float is a fraction of the run. None: they go on
            from where they are.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if one is out of range.
    """

    cuts: int = 5
    rewind_to: float | int | None = None
    name: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_count(self.cuts, "cuts")
        if self.rewind_to is not None:
            check_part("rewind_to", self.rewind_to)

    def _value(self, passed: float, initial: float, final: float) -> float:
        return geometric(passed, initial, final)

    def check(self, total_steps: int) -> None:
        """Fits where the ramp has a step for each cut, and weights are remembered before the first.

        Raises:
            ValueError: if not.
        """
        super().check(total_steps)
        warmup, cooldown = self.resolve(total_steps)
        first_cut = -(-(total_steps - warmup - cooldown) // self.cuts)
        _check_rewind(self.rewind_to, warmup + first_cut, total_steps)

    def rewinds(self, step: int, total_steps: int) -> Rewind | None:
        """Remember weights at `rewind_to`, restore them at each cut."""
        cut = step > 0 and self(step, total_steps, 0.0, 1.0) != self(
            step - 1, total_steps, 0.0, 1.0
        )
        return _rewind(self.rewind_to, cut, step, total_steps)

    @property
    def remembers(self) -> bool:
        """Whether weights go back."""
        return self.rewind_to is not None


@dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """The final value at once, after training that far without pruning.

    >>> one_shot = OneShotSchedule(at=0.5)
    >>> [one_shot(step, 10, 1.0, 0.25) for step in (0, 4, 5, 10)]
    [1.0, 1.0, 0.25, 0.25]

    Attributes:
        at: the step of the cut; a float is a fraction of the run.
        rewind_to: as for `StepSchedule`.
        freeze: whether the masks stay as they were cut.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if one is out of range.
    """

    at: float | int = 0.5
    rewind_to: float | int | None = None
    freeze: bool = False
    name: ClassVar[str] = "one_shot"

    def __post_init__(self) -> None:
        check_part("at", self.at)
        check_flag("freeze", self.freeze)
        if self.rewind_to is not None:
            check_part("rewind_to", self.rewind_to)

    def __call__(self, step: int, total_steps: int, initial: float, final: float) -> float:
        """`initial` before the cut, `final` from there on."""
        return initial if step < whole_steps(self.at, total_steps) else final

    def start(self, initial: float, final: float) -> float:
        """`initial`, unless the cut is at step 0."""
        return initial if self.at else final

    def check(self, total_steps: int) -> None:
        """Fits where the cut is within the run, and weights are remembered before it.

        Raises:
            ValueError: if not.
        """
        at = whole_steps(self.at, total_steps)
        if at >= total_steps:
            raise ValueError(
                f"the cut is at step {at}, and the run has total_steps={total_steps}. Train longer,"
                " or cut earlier."
            )
        _check_rewind(self.rewind_to, at, total_steps)

    def frozen(self, step: int, total_steps: int) -> bool:
        """From the cut on, if `freeze` says so; never before the first step."""
        return self.freeze and step >= max(1, whole_steps(self.at, total_steps))

    @property
    def freezes(self) -> bool:
        """As `freeze` says."""
        return self.freeze

    def rewinds(self, step: int, total_steps: int) -> Rewind | None:
        """Remember weights at `rewind_to`, restore them at the cut."""
        cut = step == whole_steps(self.at, total_steps)
        return _rewind(self.rewind_to, cut, step, total_steps)

    @property
    def remembers(self) -> bool:
        """Whether weights go back."""
        return self.rewind_to is not None


def _rewind(rewind_to: float | int | None, cut: bool, step: int, total_steps: int) -> Rewind | None:
    if rewind_to is None:
        return None
    if step == whole_steps(rewind_to, total_steps):
        return "remember"
    return "restore" if cut else None


def _check_rewind(rewind_to: float | int | None, first_cut: int, total_steps: int) -> None:
    if rewind_to is not None and whole_steps(rewind_to, total_steps) >= first_cut:
        raise ValueError(
            f"rewind_to is step {whole_steps(rewind_to, total_steps)}, and the first cut is at "
            f"step {first_cut}. Weights can only go back to before it."
        )
