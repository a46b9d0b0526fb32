"""What a training loop forgot, said once by a warning that names the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvpfx.distributed import is_sharded

if TYPE_CHECKING:
    from mvpfx.mask import Mask

STEPS_TO_WAIT = 3
"""Optimizer steps in which scores may stay as they are: a loss scaler may skip the first ones."""
SAMPLE = 1024
"""How many scores of one mask are looked at."""
STEPS_WITHOUT_PENALTY = 10
Place = tuple[float | None, float]
BACK = 0.01
"""By how much a density may rise, or a threshold fall, when a run begins."""
FAR = 0.1
"""Units kept above the configured density, as a fraction of all, that `convert` warns of."""


class Loop:
    """Watches whether a loop trains the scores, and adds the penalty where the criterion needs it.

    Args:
        masks: those that have scores.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        learned = [m for m in masks if m.criterion.learned and m.scores is not None]
        plain = [m for m in learned if not is_sharded(m.require_scores()) and m.shard is None]
        trains = [m for m in plain if m.require_scores().requires_grad or m.accumulates]
        self._mask = min(trains, key=lambda m: m.units, default=None)
        self._penalised = [m for m in masks if m.criterion.penalised]
        self._scores: Tensor | None = None
        self._weight_version = 0
        self._steps = 0
        self._said: set[str] = set()
        if self._mask is not None:
            self._scores = _sample(self._mask.require_scores()).clone()
            self._weight_version = self._mask.weight._version

    def step(self) -> None:
        """Look once per optimizer step."""
        self._steps += 1
        if self._scores is not None and self._steps >= STEPS_TO_WAIT:
            self._look_at_scores()
        if self._penalised and self._steps == STEPS_WITHOUT_PENALTY:
            self._look_at_penalty()

    def _look_at_scores(self) -> None:
        mask, then = self._mask, self._scores
        assert mask is not None and then is not None
        now = _sample(mask.require_scores())
        same = now.shape == then.shape and torch.equal(now.to(then.device), then)
        if same and mask.weight._version == self._weight_version:
            return  # nothing is trained at all, or weights are frozen
        self._scores = None
        if same:
            warnings.warn(
                f"the optimizer changes {mask.site.name} and not its scores, so the mask would "
                "never learn. Make the optimizer after mvpfx.prepare, with "
                "mvpfx.parameter_groups(model, lr=...), and give scores a learning rate (score_lr) "
                "above 0.",
                stacklevel=4,
            )

    def _look_at_penalty(self) -> None:
        mask = self._penalised[0]
        trained = self._mask is not None and mask.weight._version != self._weight_version
        asked = any(m.penalty_lambda or m.steered is not None for m in self._penalised)
        if trained and asked and not any(m.penalty_asked for m in self._penalised):
            warnings.warn(
                f'criterion "{mask.rule.criterion}" needs its penalty in the loss, and '
                "mvpfx.penalty was never called: scores would not fall. Train with "
                "(loss + mvpfx.penalty(model)).backward().",
                stacklevel=4,
            )


def _sample(scores: Tensor) -> Tensor:
    """Some of the scores, evenly spread: a copy of all of them would take memory while training."""
    flat = scores.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)]


def come_to(mask: Mask) -> Place | None:
    """Density and threshold that a mask came to in an earlier run; None where there was none."""
    mask.follow_progress()
    return (mask.density, mask.threshold) if mask.step else None


def has_ended(masks: Sequence[Mask]) -> bool:
    """Whether an earlier run has brought all masks to their final density or threshold."""
    ends = [(come_to(m), m.criterion.targets(m.rule, lambda _, final: final)) for m in masks]
    return bool(ends) and all(found == (end.density, end.threshold) for found, end in ends)


def undone(
    before: Sequence[tuple[float | None, float] | None], masks: Sequence[Mask]
) -> str | None:
    """What to say where a new schedule has taken masks back; None where it has not.

    Args:
        before: what `come_to` found before the schedule began.
        masks: the same masks now.
    """
    for found, mask in zip(before, masks, strict=True):
        if found is None:
            continue
        density, threshold = found
        if density is not None and mask.density is not None:
            less, words = mask.density > density + BACK, f"density {density:.4g}"
        else:
            less, words = mask.threshold < threshold - BACK, f"threshold {threshold:.4g}"
        if less:
            return (
                f"the mask of {mask.site.name} came to {words} in an earlier run, and this "
                "scheduler would start its schedule anew, and bring back what was pruned. To "
                "resume that run call scheduler.load_state_dict(state) before the first step; to "
                "train on at that density build SparsityScheduler(model, total_steps, keep=True); "
                "to start anew on purpose, keep=False."
            )
    return None


def warn_of_density(masks: Sequence[Mask]) -> None:
    """Warn where a model to be converted keeps far more than its configuration asks for.

    Args:
        masks: of the prepared model, those that have scores.
    """
    aimed = [m for m in masks if m.density is not None and m.rule.density < 1]
    units = sum(m.units for m in aimed)
    if not units:
        return
    kept = sum(m.density * m.units for m in aimed if m.density is not None) / units
    final = sum(m.rule.density * m.units for m in aimed) / units
    if kept - final > FAR:
        warnings.warn(
            f"{kept:.0%} of the units are kept where the configuration asks for {final:.0%}: the "
            "schedule has not come to its end. Call scheduler.step() once per optimizer step, for "
            "all of total_steps, before mvpfx.convert; with schedule=mvpfx.ConstantSchedule() the "
            "density is final from the start.",
            stacklevel=3,
        )
