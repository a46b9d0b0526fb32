"""L0 regularisation: gates that are drawn in training, and learn to be shut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvpfx.criterion import Criterion, Progress, Targets
from mvpfx.distributed import gathered, mean
from mvpfx.granularity import from_matrix, matrix_shape
from mvpfx.score_init import rank

if TYPE_CHECKING:
    from mvpfx.mask import Mask
    from mvpfx.rule import Rule

LEAST, MOST, TEMPERATURE = -0.1, 1.1, 2 / 3
"""The interval that gates are stretched to before they are cut to [0, 1], and the temperature."""
OPEN = math.log(0.9 / 0.1)
"""The score of a gate that is open with probability 0.9, before stretching."""
_NOISE = 1e-4
_SHIFT = TEMPERATURE * math.log(-LEAST / MOST)


class L0(Criterion):
    """Multiply every unit by a hard-concrete gate, and pay for gates that are not shut.

    Louizos et al. 2018, with the constants that the authors of Sanh et al. 2020 use: in training
    `z = clamp(sigmoid((logit(u) + S) / b) * (r - l) + l, 0, 1)` with `u` uniform, drawn anew in
    every forward; in evaluation without `u` and `b`. `W' = W * z`, with its exact gradients for
    both. The penalty is `lambda * mean sigmoid(S - b * log(-l / r))`, the share of gates that are
    expected not to be shut. `lambda` rises with the schedule to `penalty_lambda`; without one it is
    steered to the density that the schedule asks for, see `mvpfx.steering`. A gate need not be 0 or
    1, so converting multiplies it in; a unit counts as kept where its gate is above 0.

    First scores are those of gates that are open with probability 0.9, as in the paper, or with
    `score_init="magnitude"` that plus the rank of `abs(W)` in [-1, 1].
    """

    name = "l0"
    stored = "parameter"
    pooled = False
    penalised = True

    def initial(self, mask: Mask) -> Tensor:
        """The logit of 0.9, in the order of `abs(W)` if asked; or the number that was given."""
        parts = mask.unit_weights().chunk(mask.site.parts)
        return torch.cat([_first(part, mask.rule.score_init) for part in parts])

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        """The penalty's factor, from 0 to the rule's; where that is steered, a density."""
        if rule.penalty_lambda is None:
            return Targets(steered=progress(1.0, rule.density))
        return Targets(penalty_lambda=progress(0.0, rule.penalty_lambda))

    def kept(self, mask: Mask) -> Tensor:
        """The units whose gate is above 0 in evaluation."""
        return gate(gathered(mask.require_scores().detach())) > 0

    def cutoff(self, mask: Mask) -> float:
        """The score of a gate that just shuts."""
        return math.log(-LEAST / MOST)

    def apply(self, mask: Mask, weight: Tensor) -> Tensor:
        """The weight times its gates; one that makes channels leaves gating to what reads them."""
        if mask.leader is not None and mask.granularity.cols is None:
            return weight if mask.training else weight * mask.mask()
        return self._gated(mask, weight)

    def repeats(self, mask: Mask) -> bool:
        """Not in training, where gates are drawn."""
        return not mask.training

    def _gated(self, mask: Mask, weight: Tensor) -> Tensor:
        scores = mask.require_scores()
        opened = gate(scores, torch.rand_like(scores)) if mask.training else gate(scores)
        if mask.frozen:
            opened = opened * mask.kept()
        site = mask.site
        matrix = mask.granularity.expand(opened, *matrix_shape(site))
        gates = from_matrix(matrix, site.shape, site.out_dim, site.parts)
        return weight * gates.to(weight.dtype)

    def slope(self, scores: Tensor) -> Tensor:
        """Of the probability that a gate is not shut."""
        paid = torch.sigmoid(scores - _SHIFT)
        return paid * (1 - paid)

    def penalty(self, mask: Mask) -> Tensor:
        """Mean probability that a gate is not shut."""
        return mean(torch.sigmoid(mask.require_scores() - _SHIFT))


def gate(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """The gates of `scores`, in [0, 1]; drawn where `noise`, uniform in [0, 1), is given."""
    if noise is not None:
        noise = noise.clamp(_NOISE, 1 - _NOISE)
        scores = (noise.log() - (-noise).log1p() + scores) / TEMPERATURE
    return (torch.sigmoid(scores) * (MOST - LEAST) + LEAST).clamp(0, 1)


def _first(values: Tensor, score_init: str | float) -> Tensor:
    if score_init == "magnitude":
        return rank(values).mul_(2.0).add_(OPEN - 1)
    return torch.full_like(values, OPEN if score_init == "zero" else float(score_init))
