"""Magnitude pruning by a moving average, which single steps do not sway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mvpfx.criterion import Criterion, Option

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class EmaMagnitude(Criterion):
    """Keep what was largest over the last optimizer steps.

    `S = beta * S + (1 - beta) * abs(W)` at each step, from `abs(W)`; the mean of `abs(W)` for
    larger units: magnitude pruning (Zhu and Gupta 2018) with a memory.
    """

    name = "ema_magnitude"
    stored = "buffer"
    options: ClassVar[Mapping[str, Option]] = {"beta": Option(0.9, most=1.0)}

    def initial(self, mask: Mask) -> Tensor:
        """Mean `abs(W)` of each unit."""
        return mask.magnitude().clone()

    def advance(self, mask: Mask) -> None:
        """Move the average towards the weights as they are now."""
        mask.require_scores().lerp_(mask.magnitude(), 1 - mask.option("beta"))
