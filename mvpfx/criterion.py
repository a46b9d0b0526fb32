"""Criterion: the rule that says how much each unit matters, and thereby which are kept.

A criterion is one class in one file of `mvpfx/criteria`. It says what it stores (`stored`), what
the schedule moves (`targets`), what is ranked (`importance`) and which units stay (`kept`); where
the defaults of `Criterion` do not fit it may also change how the mask is applied (`apply`), add a
term to the loss (`penalty`), take in gradients (`observe`) or act once per optimizer step
(`advance`). Nothing outside of `mvpfx/criteria` asks for a criterion by name.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mvpfx.score_init import MAGNITUDE, ZERO, initial_scores
from mvpfx.straight_through import apply_mask

if TYPE_CHECKING:
    from mvpfx.mask import Mask
    from mvpfx.rule import Rule


@dataclass(frozen=True)
class Targets:
    """What the schedule asks of a mask at one optimizer step.

    Attributes:
        density: fraction of units to keep; None where the criterion keeps what its scores say.
        threshold: cutoff of `sigmoid(scores)`; 0 where the criterion has none.
        penalty_lambda: factor of the penalty on the scores; 0 where there is none.
        steered: fraction of units that the penalty is to be steered to; None where its factor is
            given, or there is none.
    """

    density: float | None = None
    threshold: float = 0.0
    penalty_lambda: float = 0.0
    steered: float | None = None


@dataclass(frozen=True)
class Option:
    """A number that users may set for a criterion.

    Attributes:
        default: where they do not.
        least: the smallest that is allowed.
        most: the greatest that is allowed.
        whole: whether it counts something.
    """

    default: float
    least: float = 0.0
    most: float = math.inf
    whole: bool = False


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
    observes: ClassVar[Literal["nothing", "scores", "weight"]] = "nothing"
    """Whose gradients `observe` sees: those of the scores it takes in place of the optimizer."""
    averages: ClassVar[tuple[str, ...]] = ()
    """Frozen parameters that a mask holds beside `scores`; their names end in "scores"."""
    cuts: ClassVar[int | None] = None
    """In how many cuts the density falls where a configuration names no schedule, for criteria that
    `rank` and `make_up` at each; None: at each optimizer step.
    """
    couples: ClassVar[bool] = True
    """Whether one score can decide on units of several weights."""
    score_inits: ClassVar[tuple[str, ...]] = (MAGNITUDE, ZERO)
    """Words for first scores, where they are learned; the first is for configurations that name
    none.
    """
    options: ClassVar[Mapping[str, Option]] = {}
    """What `PruningConfig(criterion_options=...)` may set."""

    @property
    def learned(self) -> bool:
        """Whether the optimizer learns the scores."""
        return self.stored == "parameter" and self.observes == "nothing"

    def initial(self, mask: Mask) -> Tensor | None:
        """First `scores` of a mask, float32 `[r, c]`; None where nothing is stored."""
        if self.stored == "nothing":
            return None
        if self.observes == "scores":
            return torch.zeros_like(mask.unit_weights())
        parts = mask.unit_weights().chunk(mask.site.parts)
        return torch.cat([initial_scores(part, mask.rule.score_init) for part in parts])

    def average(self, mask: Mask, name: str) -> Tensor:
        """First value of one of `averages`: by default zeros of the shape of the scores."""
        return torch.zeros_like(mask.require_scores())

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        """What the schedule asks for now: by default the density, from 1 to the rule's."""
        return Targets(density=progress(1.0, rule.density))

    def importance(self, mask: Mask) -> Tensor:
        """What decides on each unit, float32 `[r, c]`, detached: greater stays longer; by default
        the scores. A `DTensor` where the scores are one.
        """
        return mask.require_scores().detach()

    def kept(self, mask: Mask) -> Tensor:
        """Which units stay, bool `[r, c]`: by default the top of the ranking the mask is in."""
        return mask.ranking.kept(mask)

    def apply(self, mask: Mask, weight: Tensor) -> Tensor:
        """The weight the matmul sees, of the same shape and dtype: by default `W * M`."""
        adds_up = mask.accumulates
        scores = mask.learned_scores() if self.stored == "parameter" and not adds_up else None
        whole = adds_up and mask.watcher is not None
        done = None if whole else mask.pack
        return apply_mask(weight, scores, mask.factor(weight), mask.layout, whole, done)

    def repeats(self, mask: Mask) -> bool:
        """Whether `apply` gives the same again while scores, weight and targets are the same."""
        return True

    def accumulates(self, mask: Mask) -> bool:
        """Whether scores add up what the weight's gradient says of them, not by an optimizer."""
        return False

    def cutoff(self, mask: Mask) -> float:
        """The score above which units stay; for `penalised` ones."""
        raise NotImplementedError(f"{self.name} has no cutoff")

    def slope(self, scores: Tensor) -> Tensor:
        """Derivative of what each unit pays with respect to its score; for `penalised` ones."""
        raise NotImplementedError(f"{self.name} has no penalty")

    def penalty(self, mask: Mask) -> Tensor:
        """Differentiable scalar that the penalty multiplies by `lambda`; for `penalised` ones."""
        raise NotImplementedError(f"{self.name} has no penalty")

    def watches(self, mask: Mask) -> Literal["nothing", "scores", "weight"]:
        """Whose gradients `observe` is to see now: by default as `observes` says."""
        return self.observes

    def observe(self, mask: Mask, gradient: Tensor) -> None:
        """Take in a gradient just before an optimizer step, for those that observe.

        That of the scores is `dL/dW' * W` summed over each unit, of all batches of the step
        together, float32 `[r, c]`, a `DTensor` where the scores are one; that of the weight is
        `dL/dW' * M`, of the weight's shape and dtype.
        """
        raise NotImplementedError(f"{self.name} does not observe gradients")

    def rank(self, mask: Mask, kept: Tensor | None) -> None:
        """Renew what is ranked, where the density has just fallen; for those with `cuts` at each
        cut, for those whose first scores are measured at the first.

        Args:
            mask: of the new density.
            kept: which units stayed until now, bool `[r, c]`; None for all of them.
        """
        raise NotImplementedError(f"{self.name} does not rank at cuts")

    def make_up(self, mask: Mask, before: Tensor, after: Tensor) -> None:
        """Change the weights that stay, after a cut; for those with `cuts`.

        Args:
            mask: whose weight may be written to.
            before: which units stayed before the cut, bool `[r, c]`.
            after: which stay after it, bool `[r, c]`.
        """
        raise NotImplementedError(f"{self.name} does not make up for cuts")

    def advance(self, mask: Mask) -> None:  # noqa: B027  most criteria have nothing to do here
        """Act once per optimizer step, when the scheduler moves: by default nothing."""
