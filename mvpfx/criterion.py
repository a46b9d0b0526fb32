"""Criteria: the rules that say how much each unit matters, and thereby which are kept.

A criterion is one class. It says what it stores (`stored`), what the schedule moves (`targets`),
what is ranked (`importance`) and which units stay (`kept`); where the defaults of `Criterion` do
not fit it may also change how the mask is applied (`apply`), add a term to the loss (`penalty`) or
act once per optimizer step (`advance`). Nothing outside this file asks for a criterion by name:
`register` is all that a new one needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mvpfx.distributed import gathered, mean
from mvpfx.score_init import initial_scores
from mvpfx.straight_through import apply_mask

if TYPE_CHECKING:
    from mvpfx.config import Rule
    from mvpfx.mask import Mask


@dataclass(frozen=True)
class Targets:
    """What the schedule asks of a mask at one optimizer step.

    Attributes:
        density: fraction of units to keep; None where the criterion keeps what its scores say.
        threshold: cutoff of `sigmoid(scores)`; 0 where the criterion has none.
        penalty_lambda: factor of the penalty on the scores; 0 where there is none.
    """

    density: float | None = None
    threshold: float = 0.0
    penalty_lambda: float = 0.0


Progress = Callable[[float, float], float]
"""The schedule at one step: (initial value, final value) -> value now."""


class Criterion(ABC):
    """What all criteria share: exact top-v of `importance`, straight-through gradients."""

    name: ClassVar[str]
    """As in `PruningConfig(criterion=...)`."""
    stored: ClassVar[Literal["parameter", "buffer", "nothing"]] = "nothing"
    """What a mask holds as `scores`: learned, accumulated, or nothing."""
    pooled: ClassVar[bool] = True
    """Whether global scope ranks units across sites."""
    penalised: ClassVar[bool] = False
    """Whether `penalty` adds a term to the loss."""

    def initial(self, mask: Mask) -> Tensor | None:
        """First `scores` of a mask, float32 `[r, c]`; None where nothing is stored."""
        if self.stored == "nothing":
            return None
        parts = mask.unit_weights().chunk(mask.site.parts)
        return torch.cat([initial_scores(part, mask.rule.score_init) for part in parts])

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        """What the schedule asks for now: by default the density, from 1 to the rule's."""
        return Targets(density=progress(1.0, rule.density))

    @abstractmethod
    def importance(self, mask: Mask) -> Tensor:
        """What decides on each unit, float32 `[r, c]`, detached: greater stays longer. A `DTensor`
        where the scores are one.
        """

    def kept(self, mask: Mask) -> Tensor:
        """Which units stay, bool `[r, c]`: by default the top of the ranking the mask is in."""
        return mask.ranking.kept(mask)

    def apply(self, mask: Mask, weight: Tensor) -> Tensor:
        """The weight the matmul sees, of the same shape and dtype: by default `W * M`."""
        scores = mask.scores if self.stored == "parameter" else None
        site, factor = mask.site, mask.factor(weight)
        return apply_mask(weight, scores, factor, mask.granularity, site.out_dim, site.parts)

    def penalty(self, mask: Mask) -> Tensor:
        """Differentiable scalar that the penalty multiplies by `lambda`; for `penalised` ones."""
        raise NotImplementedError(f"{self.name} has no penalty")

    def advance(self, mask: Mask) -> None:  # noqa: B027  most criteria have nothing to do here
        """Act once per optimizer step, when the scheduler moves: by default nothing."""


class Movement(Criterion):
    """Keep the top-v of learned scores.

    Sanh et al. 2020: `M = Top_v(S)`, Eq. 1; `dL/dS = dL/dW' * W` summed over the unit, for masked
    units too, Eq. 2.
    """

    name = "movement"
    stored = "parameter"

    def importance(self, mask: Mask) -> Tensor:
        """The learned scores."""
        return mask.require_scores().detach()


class SoftMovement(Movement):
    """Keep what passes a threshold: Sanh et al. 2020, section 4 (relaxed version).

    `M = sigmoid(S) > tau`, with the gradient of `movement` (straight-through passes the sigmoid
    too) and the penalty `lambda * mean sigmoid(S)`. As in the authors' code the schedule moves
    `tau` from 0, and `lambda(t) = lambda_f * tau(t) / tau_f` rises with it. The density follows
    from the scores, so the rule's density and scope have no effect.
    """

    name = "soft_movement"
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


class Magnitude(Criterion):
    """Keep the largest weights: `M = Top_v(abs(W))`, the mean of `abs(W)` for larger units.

    Zhu and Gupta 2018, as in Sanh et al. 2020, section 3: masked weights keep their value and may
    come back, but only weights that are kept receive a gradient.
    """

    name = "magnitude"

    def importance(self, mask: Mask) -> Tensor:
        """Mean `abs(W)` of each unit, now."""
        return mask.magnitude()


_CRITERIA: dict[str, Criterion] = {}


def register(criterion: Criterion) -> Criterion:
    """Make `criterion` available under its name; a later one of the same name replaces it."""
    _CRITERIA[criterion.name] = criterion
    return criterion


def names() -> list[str]:
    """Names of all criteria, in order of registration."""
    return list(_CRITERIA)


def find(name: object) -> Criterion:
    """The criterion called `name`.

    Raises:
        TypeError: if `name` is no text.
        ValueError: if there is none of that name.
    """
    known = ", ".join(f'"{known}"' for known in _CRITERIA)
    if not isinstance(name, str):
        raise TypeError(f"criterion must be a name; found {name!r}. Use one of {known}.")
    if name not in _CRITERIA:
        raise ValueError(f'criterion "{name}" is unknown. Use one of {known}.')
    return _CRITERIA[name]


for _criterion in (Movement(), SoftMovement(), Magnitude()):
    register(_criterion)
