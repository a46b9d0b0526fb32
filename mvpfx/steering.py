"""Steering: the factor of a penalty that brings soft criteria to the density that is asked for.

How many units a factor leaves depends on model, task, learning rate and length of the run, so it is
found while training. The distance that counts is that of scores: how far the score of the unit that
should be the last to stay is from the cutoff. The factor pulls it there in proportion to the
distance (with a gain that grows while the scores move too slowly and shrinks while they move too
fast) and to its sum over time (which holds the scores where the task would move them). It may turn
negative: then it pays for units that stay, and the density rises.

The factor is in units of the gradients that the task gives to scores, so that one law serves all
models: their mean square over the last thousand steps, without the part that lies in the direction
of the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from mvpfx.mask import Mask

HORIZON, LEAST_HORIZON, MOST_HORIZON = 0.02, 3.0, 20.0
"""Part of the run in which the scores are to cover the distance, and its bounds in steps."""
GAIN, LEAST_GAIN, MOST_GAIN = 10.0, 5.0, 300.0
GAIN_STEP = 1.03
NEAR = 0.1
"""Distance from which on the sum over time counts."""
SUM_SHARE, MOST_SUM = 0.02, 2.0
MOST_PULL = 10.0
"""The strongest pull, in units of the task's gradients."""
LEAST_SLOPE = 1e-3
"""Of the penalty: scores that are higher are hardly moved by it, at any factor."""
MEMORY, SPEED_MEMORY = 0.999, 0.8


@dataclass
class Pull:
    """The state of a controller; plain numbers, fit for JSON.

    Attributes:
        gain: pull for a distance of 1.
        total: what is held against the task.
        power: smoothed mean square of the task's gradients, before its correction for few steps.
        steps: how many of them were seen.
        speed: smoothed change of the last staying unit's score in a step.
        ahead: smoothed change of that score in a step because the target density moves.
        last: that score after the last step; None before the first.
        last_target: the density it was the score of.
        factor: what the penalty is multiplied by.
    """

    gain: float = GAIN
    total: float = 0.0
    power: float = 0.0
    steps: int = 0
    speed: float = 0.0
    ahead: float = 0.0
    last: float | None = None
    last_target: float = 1.0
    factor: float = 0.0

    def measure(self, power: float) -> None:
        """Take in the mean square of one step's gradients."""
        self.power = MEMORY * self.power + (1 - MEMORY) * power
        self.steps += 1

    def scale(self) -> float:
        """Root mean square of the task's gradients."""
        if not self.steps:
            return 0.0
        return math.sqrt(max(self.power, 0.0) / (1 - MEMORY**self.steps))

    def steer(
        self, distance: float, moved: float, ahead: float, horizon: float, reference: float
    ) -> None:
        """Set the factor anew.

        Args:
            distance: of the last staying unit's score above the cutoff.
            moved: change of that score in the last step.
            ahead: how much higher the score is that is to be the last one now.
            horizon: steps in which the distance is to be covered.
            reference: gradient that a factor of 1 gives to that unit.
        """
        if self.steps > 1:
            self.speed = SPEED_MEMORY * self.speed + (1 - SPEED_MEMORY) * moved
            self.ahead = SPEED_MEMORY * self.ahead + (1 - SPEED_MEMORY) * ahead
            wanted = -distance / horizon - self.ahead
            slow = (self.speed - wanted) * distance > 0
            gain = self.gain * (GAIN_STEP if slow else 1 / GAIN_STEP)
            self.gain = min(max(gain, LEAST_GAIN), MOST_GAIN)
        if abs(distance) < NEAR:
            total = self.total + SUM_SHARE * self.gain * distance
            self.total = min(max(total, -MOST_SUM), MOST_SUM)
        pull = min(max(self.gain * distance + self.total, -MOST_PULL), MOST_PULL)
        self.factor = pull * self.scale() / reference


class Steering:
    """Steers the penalty of masks whose density counts together.

    Args:
        masks: of one criterion, that have `steered` densities, all the same.
        penalised: how many masks of the model share the penalty.
        total_steps: length of the run.
    """

    def __init__(self, masks: Sequence[Mask], penalised: int, total_steps: int) -> None:
        self.masks = list(masks)
        self.penalised = penalised
        self.horizon = min(max(HORIZON * total_steps, LEAST_HORIZON), MOST_HORIZON)
        self.pull = Pull()

    def observe(self, optimizer: Optimizer) -> None:
        """Measure the gradients of the scores, just before an optimizer that holds them steps."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        square = along = length = 0.0
        for mask in self.masks:
            scores = mask.require_scores().detach()
            gradient = mask.require_scores().grad
            if gradient is None or id(mask.require_scores()) not in held:
                return
            slope = mask.criterion.slope(scores) / scores.numel()
            square += float(gradient.square().sum())
            along += float((gradient * slope).sum())
            length += float(slope.square().sum())
        own = square - along**2 / length if length else square
        self.pull.measure(own / sum(mask.units for mask in self.masks))

    def move(self) -> None:
        """Set the penalty's factor of the masks, after an optimizer step."""
        first = self.masks[0]
        assert first.steered is not None, "a steered mask"
        scores = torch.cat([mask.require_scores().detach().flatten() for mask in self.masks])
        cutoff = first.criterion.cutoff(first)
        # Sites at their floor keep units that are below the cutoff; others make up for them.
        kept = sum(int(mask.kept().sum()) for mask in self.masks)
        target = first.steered - (kept - int((scores > cutoff).sum())) / scores.numel()
        now, before = _lowest_kept(scores, target, self.pull.last_target)
        moved = 0.0 if self.pull.last is None else before - self.pull.last
        slope = float(first.criterion.slope(torch.tensor(max(now, cutoff))))
        reference = max(slope, LEAST_SLOPE) * len(self.masks) / (self.penalised * scores.numel())
        self.pull.steer(now - cutoff, moved, now - before, self.horizon, reference)
        self.pull.last, self.pull.last_target = now, target
        self.apply()

    def apply(self) -> None:
        """Give the masks the factor as it is."""
        for mask in self.masks:
            mask.penalty_lambda = self.pull.factor
            mask.note_progress()

    def state_dict(self) -> dict[str, Any]:
        """The controller's numbers."""
        return asdict(self.pull)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.pull = Pull(**state)
        self.apply()


def steerings(masks: Sequence[Mask], total_steps: int) -> list[Steering]:
    """One for each mask of local scope that is steered, one for those of global scope together."""
    groups: dict[Any, list[Mask]] = {}
    for mask in masks:
        if mask.steered is not None:
            rule = mask.rule
            pool = (rule.criterion, rule.density, rule.threshold)
            groups.setdefault(pool if rule.scope == "global" else id(mask), []).append(mask)
    penalised = sum(mask.criterion.penalised for mask in masks)
    return [Steering(group, penalised, total_steps) for group in groups.values()]


def _lowest_kept(scores: Tensor, *densities: float) -> list[float]:
    """The score of the last unit that stays at each of these densities."""
    units = scores.numel()
    places = [units - min(units, max(1, round(density * units))) for density in densities]
    if scores.device.type == "cpu":
        values = scores.numpy()
        values.partition(places)
        return [float(values[place]) for place in places]
    return [float(scores.kthvalue(place + 1).values) for place in places]
