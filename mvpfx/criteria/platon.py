"""PLATON: what matters, or may come to matter, stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mvpfx.criterion import Criterion, Option

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Platon(Criterion):
    """Keep the top of smoothed sensitivity times smoothed uncertainty.

    Zhang et al., ICML 2022: with `I = abs(dL/dW' * W)` at each optimizer step,
    `I_bar = beta_1 * I_bar + (1 - beta_1) * I`, `U = abs(I - I_bar)`,
    `U_bar = beta_2 * U_bar + (1 - beta_2) * U`, and `S = I_bar * U_bar`, all from 0. Inside a
    larger unit the products are summed before their absolute value is taken.
    """

    name = "platon"
    stored = "parameter"
    observes = "scores"
    averages = ("sensitivity_scores", "uncertainty_scores")
    options: ClassVar[Mapping[str, Option]] = {
        "beta_1": Option(0.85, most=1.0),
        "beta_2": Option(0.95, most=1.0),
    }

    def observe(self, mask: Mask, gradient: Tensor) -> None:
        """Move both averages by one step."""
        sensitivity, uncertainty = mask.averages()
        change = gradient.abs()
        sensitivity.lerp_(change, 1 - mask.option("beta_1"))
        uncertainty.lerp_((change - sensitivity).abs_(), 1 - mask.option("beta_2"))
        mask.require_scores().copy_(sensitivity).mul_(uncertainty)
