"""Movement pruning: keep what moves away from zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mvpfx.criterion import Criterion, Option
from mvpfx.distributed import gathered, scattered
from mvpfx.score_init import MAGNITUDE, SENSITIVITY, SENSITIVITY_SPREAD, ZERO, rank

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Movement(Criterion):
    """Keep the units that moved away from zero: `M = Top_v(S)`, `dS = dL/dW' * W`.

    Sanh et al. 2020, Eq. 1 and 2. The score gradient is straight-through: it also reaches the
    scores of units that are masked, which may come back.

    With `score_init="sensitivity"` the scores add up `abs(dL/dW' * W)`, what the loss would miss to
    first order (Molchanov et al. 2019), while nothing is pruned, and the optimizer leaves them
    alone. At the first cut they become the rank of that within the site, in [0, 6], and are
    learned from there. Units that no gradient has reached rank by `abs(W)`. Where a schedule starts
    below density 1 there is nothing to measure, and `abs(W)` decides as well.

    With the option `accumulate` there is no optimizer between gradient and score: each optimizer
    step takes `alpha * dL/dW' * W` from the scores (Eq. 4), `alpha` being their learning rate. They
    have neither gradient nor moments; measured ones keep their sum, `alpha * abs(dL/dW' * W)`, in
    the place of its rank.
    """

    name = "movement"
    stored = "parameter"
    score_inits: ClassVar[tuple[str, ...]] = (SENSITIVITY, MAGNITUDE, ZERO)
    options: ClassVar[Mapping[str, Option]] = {"accumulate": Option(0, most=1, whole=True)}

    def accumulates(self, mask: Mask) -> bool:
        """Where the option says so."""
        return bool(mask.option("accumulate"))

    def watches(self, mask: Mask) -> Literal["nothing", "scores", "weight"]:
        """The scores, until the first cut."""
        return "scores" if mask.measuring and not mask.accumulates else "nothing"

    def observe(self, mask: Mask, gradient: Tensor) -> None:
        """Add one step's change of the loss."""
        mask.require_scores().add_(gradient.abs())

    def rank(self, mask: Mask, kept: Tensor | None) -> None:
        """Turn what was measured into first scores; sums go on where scores accumulate."""
        if mask.accumulates:
            return
        scores = mask.require_scores()
        measured = gathered(scores.detach()).chunk(mask.site.parts)
        weights = mask.unit_weights().chunk(mask.site.parts)
        known = zip(measured, weights, strict=True)
        ranks = [rank(sums if sums.any() else held) for sums, held in known]
        scores.copy_(scattered(torch.cat(ranks).mul_(SENSITIVITY_SPREAD), scores))
        mask.forget()
