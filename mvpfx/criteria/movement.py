"""Movement pruning: keep the weights that move away from zero."""

from __future__ import annotations

from mvpfx.criterion import Criterion


class Movement(Criterion):
    """Keep the top-v of learned scores.

    Sanh et al. 2020: `M = Top_v(S)`, Eq. 1; `dL/dS = dL/dW' * W` summed over the unit, for masked
    units too, Eq. 2.
    """

    name = "movement"
    stored = "parameter"
