"""Saliency: keep what the loss would miss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mvpfx.criterion import Criterion

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Saliency(Criterion):
    """Keep the units whose removal would change the loss most, to first order.

    `S = S + abs(dL/dW' * W)`, summed over the optimizer steps, from 0: the first-order Taylor
    importance of Molchanov et al. 2019. Inside a larger unit the products are summed before their
    absolute value is taken: that is the change of the loss if the whole unit goes. The gradient is
    that of the masked weight, so units that are masked keep collecting and may return.
    """

    name = "saliency"
    stored = "parameter"
    observes = "scores"

    def observe(self, mask: Mask, gradient: Tensor) -> None:
        """Add one step's change."""
        mask.require_scores().add_(gradient.abs())
