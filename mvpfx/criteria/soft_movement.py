"""Soft movement pruning: keep what passes a threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvpfx.criterion import Criterion, Progress, Targets
from mvpfx.distributed import gathered, mean

if TYPE_CHECKING:
    from mvpfx.mask import Mask
    from mvpfx.rule import Rule


class SoftMovement(Criterion):
    """Keep what passes a threshold: Sanh et al. 2020, section 4 (relaxed version).

    `M = sigmoid(S) > tau`, with the gradient of `movement` (straight-through passes the sigmoid
    too) and the penalty `lambda * mean sigmoid(S)`. As in the authors' code the schedule moves
    `tau` from 0, and `lambda(t) = lambda_f * tau(t) / tau_f` rises with it. The density follows
    from the scores, so the rule's density and scope have no effect.
    """

    name = "soft_movement"
    stored = "parameter"
    pooled = False
    penalised = True

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        """The threshold from 0 to the rule's, and the penalty's factor in proportion."""
        threshold = progress(0.0, rule.threshold)
        penalty_lambda = rule.penalty_lambda * (threshold / rule.threshold)
        return Targets(threshold=threshold, penalty_lambda=penalty_lambda)

    def kept(self, mask: Mask) -> Tensor:
        """The units whose `sigmoid(S)` is above the threshold."""
        return torch.sigmoid(gathered(mask.require_scores().detach())) > mask.threshold

    def penalty(self, mask: Mask) -> Tensor:
        """Mean of `sigmoid(S)` over the units of this site."""
        return mean(torch.sigmoid(mask.require_scores()))
