"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mvpfx.criterion import Criterion

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Magnitude(Criterion):
    """Keep the largest weights: `M = Top_v(abs(W))`, the mean of `abs(W)` for larger units.

    Zhu and Gupta 2018, as in Sanh et al. 2020, section 3: masked weights keep their value and may
    come back, but only weights that are kept receive a gradient.
    """

    name = "magnitude"

    def importance(self, mask: Mask) -> Tensor:
        """Mean `abs(W)` of each unit, now."""
        return mask.magnitude()
