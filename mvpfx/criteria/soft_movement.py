"""Soft movement pruning: keep what passes a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mvpfx.criterion import Criterion, Option, Progress, Targets
from mvpfx.distributed import gathered, mean
from mvpfx.top_v import top_v

if TYPE_CHECKING:
    from mvpfx.mask import Mask
    from mvpfx.rule import Rule


_MARGIN = 0.05
"""How far above the cutoff the lowest scores start."""


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


class SoftMovement(Criterion):
    """Keep what passes a threshold: Sanh et al. 2020, section 4 (relaxed version).

    `M = sigmoid(S) > tau`, with the gradient of `movement` (straight-through passes the sigmoid
    too) and the penalty `lambda * mean sigmoid(S)`. With a `penalty_lambda`, as in the authors'
    code, the schedule moves `tau` from 0, and `lambda(t) = lambda_f * tau(t) / tau_f` rises with
    it: the density follows from the scores, and the rule's density has no effect. Without one `tau`
    is final from the start, and `lambda` is steered to the density that the schedule asks for, see
    `mvpfx.steering`.

    Where `lambda` is steered and `score_init` is "magnitude", the scores start right above the
    cutoff, not at 0: they have a shorter way to go, so that a run of a few hundred steps will do.

    The option `floor` is the fraction of units that stay whatever their scores, the top ones; at
    least one.
    """

    name = "soft_movement"
    stored = "parameter"
    pooled = False
    options: ClassVar[Mapping[str, Option]] = {"floor": Option(0.005, most=1.0)}
    penalised = True

    def initial(self, mask: Mask) -> Tensor | None:
        """As for all learned scores, but from the cutoff up where the penalty is steered."""
        scores, rule = super().initial(mask), mask.rule
        if scores is None or rule.penalty_lambda is not None or rule.score_init != "magnitude":
            return scores
        return scores.add_(_logit(rule.threshold) + _MARGIN)

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        """The threshold from 0 to the rule's, and the penalty's factor in proportion; where that is
        steered, the final threshold and a density.
        """
        if rule.penalty_lambda is None:
            return Targets(threshold=rule.threshold, steered=progress(1.0, rule.density))
        threshold = progress(0.0, rule.threshold)
        penalty_lambda = rule.penalty_lambda * (threshold / rule.threshold)
        return Targets(threshold=threshold, penalty_lambda=penalty_lambda)

    def kept(self, mask: Mask) -> Tensor:
        """The units whose `sigmoid(S)` is above the threshold, or the top of them."""
        scores = gathered(mask.require_scores().detach())
        passed = torch.sigmoid(scores) > mask.threshold
        floor = max(1, round(mask.option("floor") * scores.numel()))
        if scores.device.type != "cpu":  # both are computed, so that nobody waits for a number
            return torch.where(passed.sum() >= floor, passed, top_v([scores], floor)[0])
        return passed if int(passed.sum()) >= floor else top_v([scores], floor)[0]

    def cutoff(self, mask: Mask) -> float:
        """The logit of the threshold."""
        return _logit(mask.threshold)

    def slope(self, scores: Tensor) -> Tensor:
        """Of `sigmoid(S)`."""
        paid = torch.sigmoid(scores)
        return paid * (1 - paid)

    def penalty(self, mask: Mask) -> Tensor:
        """Mean of `sigmoid(S)` over the units of this site."""
        return mean(torch.sigmoid(mask.require_scores()))
