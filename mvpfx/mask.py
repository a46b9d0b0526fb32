"""Mask: the module that stands between one weight and the matmuls that read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mvpfx.checks import check_finite, check_scores_dtype, check_weight
from mvpfx.criteria import find
from mvpfx.criterion import Criterion
from mvpfx.distributed import is_sharded, version
from mvpfx.held_mask import HeldMask
from mvpfx.interception import is_running
from mvpfx.late_nan import LateNan
from mvpfx.mask_operator import traced_mask
from mvpfx.mask_state import MaskState, nothing_recorded
from mvpfx.ranking import Ranking
from mvpfx.rule import Rule
from mvpfx.schedule import Schedule
from mvpfx.score_init import SENSITIVITY
from mvpfx.site import Site
from mvpfx.torch_private import is_fake, modes_off


class Mask(MaskState):
    """Scores, targets and schedule of one site; calling it masks the weight.

    Only `scores` is part of the state dict, and only where the criterion stores them. The weight
    itself is known to the mask but belongs to the model.

    Shapes: the weight has any rank; as a matrix it is `[outputs, inputs]`, and `[r, c]` is the
    number of units along these.

    Args:
        site: whose weight this is.
        weight: the parameter, with values.
        rule: how to prune it.
        followers: masks of other weights, whose units of the same channels these scores decide on.

    Attributes:
        leader: the mask that decides on these units; None where it is this one.
        scores: float32 `[r, c]` whatever the dtype of the weight; None where not stored.
        granularity: of the scores.
        ranking: the masks it competes with; by default itself alone.

    Raises:
        TypeError: if the weight is not floating point of 16 bits or more.
        ValueError: if it is on the meta device, holds NaN, or its units do not tile it.
    """

    leader: Mask | None = None

    def __init__(
        self, site: Site, weight: nn.Parameter, rule: Rule, followers: Sequence[Mask] = ()
    ) -> None:
        check_weight(site, weight)
        rule.granularity.check(site)
        super().__init__(site, weight, rule.granularity)
        self.rule = rule
        self.ranking = Ranking([self])
        self.followers = tuple(followers)
        for follower in self.followers:
            follower.__dict__["leader"] = self  # which belongs to a module of its own
        self.accumulates = self.criterion.accumulates(self)
        self._late = LateNan()
        self.plan = None
        self.make_scores()

    def make_scores(self) -> None:
        """Hold what the criterion stores, as it is at first."""
        with torch.no_grad(), torch.inference_mode(False):
            scores = self.criterion.initial(self)
        if scores is not None:
            learned = self.criterion.stored == "parameter"
            trains = not self.accumulates  # DDP waits for a gradient of all that does
            self.scores = nn.Parameter(scores, requires_grad=trains) if learned else scores
            for name in self.criterion.averages:
                average = self.criterion.average(self, name)
                self.register_parameter(name, nn.Parameter(average, requires_grad=False))

    @property
    def criterion(self) -> Criterion:
        """The rule's criterion."""
        return find(self.rule.criterion)

    def option(self, name: str) -> float:
        """The value of one of the criterion's options."""
        default = self.criterion.options[name].default
        return self.rule.criterion_options.get(name, default)

    def averages(self) -> list[nn.Parameter]:
        """What the criterion keeps beside the scores, in its order."""
        return [self.get_parameter(name) for name in self.criterion.averages]

    @property
    def plan(self) -> Schedule | None:
        """The schedule; setting it puts the mask where the schedule starts."""
        return self._plan

    @plan.setter
    def plan(self, schedule: Schedule | None) -> None:
        self._plan = schedule
        self.make_room(schedule, self.granularity.units_shape(self.site))
        self._set_targets(0, schedule.start if schedule else lambda initial, final: initial)
        if self.measuring:
            with torch.no_grad():
                self.require_scores().zero_()

    @property
    def measures(self) -> bool:
        """Whether the first scores are measured before the first cut."""
        return self.rule.score_init == SENSITIVITY and SENSITIVITY in self.criterion.score_inits

    @property
    def measuring(self) -> bool:
        """Whether they are being measured now: while all units stay."""
        return self.measures and self._plan is not None and self.density == 1

    def set_step(self, step: int, total_steps: int) -> None:
        """Move density, threshold and penalty to where the schedule has them after `step` steps.

        Raises:
            ValueError: if the mask has no plan, or the plan does not fit into `total_steps`.
        """
        plan = self._plan
        if plan is None:
            raise ValueError(f"the mask of {self.site.name} has no schedule. Set its plan first.")
        self._set_targets(step, lambda initial, final: plan(step, total_steps, initial, final))

    def _set_targets(self, step: int, progress: Callable[[float, float], float]) -> None:
        self.aim(self.criterion.targets(self.rule, progress), step)
        self.forget()

    def freeze(self, kept: Tensor) -> None:
        """Keep these units, bool `[r, c]`, from now on."""
        assert self.frozen_kept is not None, "the schedule freezes"
        self.frozen_kept.copy_(kept)
        self.frozen = True
        self.note_progress()
        self.forget()

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, in shape, dtype and device of `weight`.

        Raises:
            ValueError: if the scores, or the weights they come from, hold NaN, or if the scores
                are not float32.
        """
        if torch.compiler.is_compiling() or is_fake(weight):
            return self.criterion.apply(self, weight)
        if torch.is_grad_enabled():
            self.held.release()
        elif self.criterion.repeats(self):
            return self.held.of(weight, self.ranking.state, self._masked)
        return self._masked(weight)

    def _masked(self, weight: Tensor) -> Tensor:
        """The masked weight, computed anew."""
        check_scores_dtype(self.site, self.scores)
        held = self._weight
        if isinstance(weight, nn.Parameter):
            self.hold(weight)
        try:
            return self.criterion.apply(self, weight)
        finally:
            if is_sharded(held):
                self.hold(held)

    def kept(self) -> Tensor:
        """Which units stay, bool `[r, c]`.

        Raises:
            ValueError: if the scores, or the weights they come from, hold NaN.
        """
        return self.__dict__.get("_original", self)._current()[0]

    def mask(self) -> Tensor:
        """Which weights stay, bool, of the weight's shape.

        Raises:
            ValueError: if the scores, or the weights they come from, hold NaN.
        """
        return self.__dict__.get("_original", self)._current()[1]

    def factor(self, weight: Tensor) -> Tensor | None:
        """What `weight` is multiplied by: the mask, or None where every weight stays.

        While a graph is traced it is one node of it, which finds the mask when the graph runs;
        `torch.export` has the mask stored in its graph as it is.

        Raises:
            ValueError: if the scores, or the weights they come from, hold NaN.
        """
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                return traced_mask(weight, self.scores, self.handle)
            with modes_off():
                return self.mask()
        mask = self.mask().to(weight.device)
        return None if self.density is not None and self.density >= 1 else mask

    @property
    def density_now(self) -> float:
        """Fraction of units that are kept, counted."""
        kept = self.kept()
        return int(kept.sum()) / kept.numel()

    def learned_scores(self) -> Tensor | None:
        """What the gradient of this weight's units goes to; None where nothing is stored."""
        return self.scores

    def check_finite(self, values: Tensor) -> None:
        """Make sure that scores or weights are no NaN; in a forward on CUDA, where nobody waits for
        the answer, that those of earlier steps were none.

        Raises:
            ValueError: if one is; the message names the site.
        """
        late = values.device.type == "cuda" and not is_sharded(values) and is_running()
        if late and not self._late.found(values):
            return
        check_finite(self.site, values, "weights" if self.scores is None else "scores")

    def forget(self) -> None:
        """Compute the mask anew at the next use.

        Writing to scores or weights does this by itself, unless it is done through `.data` or into
        shards of FSDP by other than an optimizer or `load_state_dict`.
        """
        for mask in (self, *self.followers):
            mask.held_mask = None
            mask.held.release()
        self.ranking.forget()

    def train(self, mode: bool = True) -> Self:
        """As for any module; also computes the mask anew."""
        self.forget()
        return super().train(mode)

    def _current(self) -> tuple[Tensor, Tensor]:
        """Units and weights that stay, from the cache where nothing has changed."""
        self.follow_progress()
        key = self.ranking.state()
        held = self.held_mask
        if held is None or held.key is not key:
            with nothing_recorded():
                stored = self.stored()
                if stored is not None and not self._is_ranked:
                    self.check_finite(stored.detach())
                kept = self.decide()
                mask = self.expand(kept)
            if self.shard is not None:
                return kept, mask  # a rank that kept all masks would hold a byte for each weight
            self.held_mask = HeldMask(key, kept, mask)
            return kept, mask
        if decision := held.decision:
            return decision
        with nothing_recorded():
            return held.unpack(self.expand)

    @property
    def _is_ranked(self) -> bool:
        """Whether a ranking of this very mask looks at its whole scores, and refuses NaN."""
        alone = self.leader is None and self.shard is None
        return alone and self.criterion.pooled and not self.frozen

    def decide(self) -> Tensor:
        """Which units stay, computed anew: bool `[r, c]`."""
        if self.frozen and self.frozen_kept is not None:
            return self.frozen_kept
        return self.criterion.kept(self)

    def own_state(self) -> Hashable:
        """What this mask depends on, to be compared: changes where scores, weight or targets do."""
        self.follow_progress()
        if self.frozen and self.frozen_kept is not None:
            return "frozen", *version(self.frozen_kept)
        source = self.source()
        if is_fake(source) or source.is_inference():
            return object()
        followed = () if self.scores is not None else [version(f.weight) for f in self.followers]
        return *version(source), *followed, self.density, self.threshold

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.progress.dtype != torch.float64:  # as half() leaves it
            self.progress = self.progress.double()
            self.note_progress()
        self.forget()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}progress"
        if name not in state_dict:  # of a version that did not keep it: the scheduler knows
            state_dict = {**state_dict, name: self.progress}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.follow_progress()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_late": LateNan()}

    def extra_repr(self) -> str:
        """Site, criterion and target, as `print(model)` shows them."""
        target = f"threshold={self.threshold:.4g}" if self.density is None else ""
        return f"{self.site.name}, {self.rule.criterion}, {target or f'density={self.density:.4g}'}"
