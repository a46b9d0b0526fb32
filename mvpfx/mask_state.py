"""What a mask is made from: scores and weight, wherever they are: whole, sharded, or traced."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mvpfx.distributed import gathered, is_sharded
from mvpfx.granularity import Granularity, from_matrix, matrix_shape, to_matrix
from mvpfx.held_mask import HeldMask
from mvpfx.held_product import HeldProduct
from mvpfx.mask_operator import register_source
from mvpfx.schedule import Rewind, Schedule
from mvpfx.site import Site
from mvpfx.torch_private import (
    is_fake,
    transforms_active,
    transforms_off,
    untransformed,
)
from mvpfx.traces import is_traced, untraced
from mvpfx.weight_layout import Layout

if TYPE_CHECKING:
    from mvpfx.criterion import Targets


@contextmanager
def nothing_recorded() -> Generator[None]:
    """Outside of autograd, inference mode, transforms and traces, whichever there are."""
    with torch.no_grad():
        if torch.is_inference_mode_enabled() or transforms_active() or is_traced():
            with torch.inference_mode(False), transforms_off(), untraced():
                yield
        else:
            yield


_PROGRESS = ("density", "threshold", "penalty_lambda", "steered", "step", "frozen")
"""What `progress` holds, in its order."""
_NONE = -1.0
"""What stands there for None."""


class MaskState(nn.Module):
    """Holds scores as its own, knows a weight that belongs to the model.

    Args:
        site: whose weight it is.
        weight: the parameter.
        granularity: of the scores.

    Attributes:
        accumulates: whether scores add up what the weight's gradient says of them.
        followers: masks of other weights, whose units of the same channels these scores decide on.
        scores: float32 `[r, c]` whatever the dtype of the weight; None where not stored.
        held: the masked weight between forwards without gradients.
        held_mask: what stays, once decided; None until then.
        layout: of the weight, with the units of the scores.
        handle: by which compiled graphs find this very mask.
        watcher: number of who takes whole gradients of the weight apart, for scores and weight,
            before an optimizer steps; None where nobody does, and they come masked.
        density: fraction of units to keep now; None where the criterion has no such target.
        threshold: cutoff of `sigmoid(scores)` now; 0 where the criterion has none.
        penalty_lambda: factor of the penalty now.
        steered: density that the penalty is steered to now; None where it is not steered.
        step: optimizer steps the scheduler has counted.
        penalty_asked: whether `penalty` was ever called for it.
        frozen: whether `frozen_kept` says what stays, not the criterion.
        frozen_kept: bool `[r, c]`, which units stay; None where the schedule never freezes.
        remembered_weight: what the weight goes back to; None where the schedule never rewinds.
        progress: density, threshold, penalty_lambda, steered, step and frozen as float64 `[6]`, -1
            for None. A buffer, so that whatever copies a model's state (`load_state_dict`, an
            average of weights, DDP) copies how far its masks have come.
    """

    scores: Tensor | None
    frozen_kept: Tensor | None
    remembered_weight: Tensor | None
    progress: Tensor
    accumulates: bool
    density: float | None
    threshold: float
    penalty_lambda: float
    steered: float | None
    step: int
    _weight: nn.Parameter

    def __init__(self, site: Site, weight: nn.Parameter, granularity: Granularity) -> None:
        super().__init__()
        self.site, self.granularity = site, granularity
        self.held = HeldProduct()
        self.held_mask: HeldMask | None = None
        self.layout = Layout(granularity, site.out_dim, site.parts)
        self.followers: tuple[MaskState, ...] = ()
        self.hold(weight)
        for name in ("scores", "frozen_kept", "remembered_weight"):
            self.register_buffer(name, None)
        self.frozen = self.penalty_asked = False
        with torch.inference_mode(False):
            start = torch.zeros(len(_PROGRESS), dtype=torch.float64, device=weight.device)
        self.register_buffer("progress", start)
        if granularity.places > 1 and not granularity.is_element:
            # Before there was this number, a unit was of neighbours in memory: such scores, of the
            # same shape, lack it, and are refused.
            self.register_buffer("places", torch.full_like(start[0], granularity.places))
        self._progress_version = start._version
        self.watcher: int | None = None
        self._expanded: tuple[Tensor, Tensor] | None = None
        self.handle = register_source(self)

    def hold(self, weight: nn.Parameter) -> None:
        """Know the weight without owning it: not as a parameter of this module."""
        self.__dict__["_weight"] = weight

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that is masked; it belongs to the model."""
        return self._weight

    def mask(self) -> Tensor:
        """Which weights stay now, bool, of the weight's shape."""
        raise NotImplementedError

    def rated(self) -> list[nn.Parameter]:
        """Its parameters whose learning rate counts."""
        own = self._parameters.items()
        held = [(name, p) for name, p in own if p is not None]
        return [p for name, p in held if p.requires_grad or (name == "scores" and self.accumulates)]

    def make_room(self, schedule: Schedule | None, units: tuple[int, int]) -> None:
        """Hold what a schedule needs beside scores; the weight as it is is the first remembered."""
        freezes, remembers = (schedule.freezes, schedule.remembers) if schedule else (False, False)
        weight = self._weight.detach()
        self.frozen = False
        self.frozen_kept = weight.new_ones(units, dtype=torch.bool) if freezes else None
        self.remembered_weight = weight.clone() if remembers else None

    def aim(self, targets: Targets, step: int) -> None:
        """Take over what a schedule asks for after `step` steps."""
        self.__dict__.update(  # numbers: nn.Module looks at each that is set by itself
            density=targets.density,
            threshold=targets.threshold,
            penalty_lambda=targets.penalty_lambda,
            steered=targets.steered,
            step=step,
        )
        self.note_progress()

    def note_progress(self) -> None:
        """Write into `progress` how far the mask has come."""
        values = [self.__dict__[name] for name in _PROGRESS]
        numbers = [_NONE if value is None else float(value) for value in values]
        if self.progress.is_meta or is_fake(self.progress):
            return
        with torch.no_grad(), torch.inference_mode(False):
            if self.progress.is_inference():
                self.progress = torch.empty_like(self.progress)
            self.progress.copy_(torch.tensor(numbers, dtype=torch.float64))
        self._progress_version = self.progress._version

    def follow_progress(self) -> bool:
        """Take over what somebody else wrote into `progress`; whether that was other than now."""
        held = self.progress
        if held.is_inference() or is_fake(held) or held._version == self._progress_version:
            return False
        self._progress_version = held._version
        found = [None if value == _NONE else value for value in held.tolist()]
        now: dict[str, Any] = dict(zip(_PROGRESS, found, strict=True))
        now |= {"step": int(now["step"] or 0), "frozen": bool(now["frozen"])}
        if all(self.__dict__[name] == value for name, value in now.items()):
            return False
        self.__dict__.update(now)
        return True

    @torch.no_grad()
    def rewind(self, action: Rewind) -> None:
        """Remember the weight as it is, or put it back to what was remembered."""
        remembered = self.remembered_weight
        assert remembered is not None, "the schedule rewinds"
        if action == "remember":
            remembered.copy_(self._weight)
        else:
            self._weight.copy_(remembered)

    def expand(self, kept: Tensor) -> Tensor:
        """Which weights stay where these units do, bool: `[r, c]` -> the weight's shape; what it
        was, where the same ones do.
        """
        before = self._expanded
        if before is not None and before[0].device == kept.device and torch.equal(before[0], kept):
            return before[1]
        site = self.site
        matrix = self.granularity.expand(kept, *matrix_shape(site))
        mask = from_matrix(matrix, site.shape, site.out_dim, site.parts).contiguous()
        # An accelerator would be waited for, and ranks with shards would hold what they share.
        comparable = kept.device.type == "cpu" and self.shard is None
        if comparable and not self.granularity.is_element:
            self._expanded = (kept, mask)
        return mask

    def pack(self) -> None:
        """Hold which weights stay in a bit each until they are asked for: after a backward pass, of
        single weights. What is frozen is held as it is anyway.
        """
        held = self.held_mask
        if held is not None and self.granularity.is_element and not self.frozen:
            held.pack()

    @property
    def units(self) -> int:
        """Number of units, kept or not."""
        rows, cols = self.granularity.units_shape(self.site)
        return rows * cols

    def matrix(self) -> Tensor:
        """The weight as `[outputs, inputs]`, detached."""
        return to_matrix(gathered(self._weight.detach()), self.site.out_dim, self.site.parts)

    def unit_weights(self) -> Tensor:
        """What stands for each unit, float32 `[r, c]`, detached: the weight itself, without a copy
        where it is float32, or the mean of `abs(W)` over a larger unit.
        """
        if self.granularity.is_element:
            return self.matrix().float()
        return self.magnitude()

    def magnitude(self) -> Tensor:
        """Mean `abs(W)` of each unit, in all weights that it is in; float32 `[r, c]`, detached."""
        total, size = self._absolute_sum(), math.prod(self.granularity.block(self.site))
        for follower in self.followers:
            total = total + follower._absolute_sum().view_as(total)
            size += math.prod(follower.granularity.block(follower.site))
        return total if size == 1 else total.div_(size)

    def _absolute_sum(self) -> Tensor:
        return self.granularity.reduce(self.matrix().float().abs(), self.site.parts).contiguous()

    def require_scores(self) -> Tensor:
        """The scores, where they are stored; a `DTensor` outside of a forward if sharded."""
        scores = self.stored()
        assert scores is not None, "the criterion stores no scores"
        return scores

    def stored(self) -> Tensor | None:
        """The scores, or None; the ones with values where `torch.export` puts fakes in place."""
        # Read past nn.Module's __getattr__: every mask of a pool is asked in every forward.
        scores = self._parameters.get("scores", self._buffers.get("scores"))
        if type(scores) is nn.Parameter and scores is self.__dict__.get("_last_stored"):
            return scores  # neither fake nor sharded: these are of other types
        if scores is not None and type(scores) is not nn.Parameter:
            scores = untransformed(scores)
        if scores is not None and is_fake(scores) and torch.compiler.is_exporting():
            return self.__dict__["_last_stored"]
        self.__dict__["_last_stored"] = scores
        if is_sharded(scores):
            self.__dict__["_shard"] = scores
        return scores

    def source(self) -> Tensor:
        """What the units are ranked by, where it changes: this rank's shard, scores or weight."""
        stored = self.stored()
        if stored is None:
            return self._weight
        return self.__dict__.get("_shard", stored)

    @property
    def shard(self) -> Tensor | None:
        """What the units are ranked by as far as it is on this rank; None where all of it is."""
        source = self.source()
        return source if is_sharded(source) else None

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; also sees the shard of the scores that FSDP puts in their place."""
        if name == "scores" and is_sharded(value):
            self.__dict__["_shard"] = value
        super().__setattr__(name, value)
        if name == "scores":
            self.stored()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the scores as the model moves, but keep their float32 values."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _replicate_for_data_parallel(self) -> Self:
        """A replica on another device: its scores are a copy, and the original decides."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_original"] = self
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this very mask."""
        own = ("handle", "_last_stored", "_shard")
        kept = {key: value for key, value in self.__dict__.items() if key not in own}
        kept |= {"watcher": None, "_expanded": None, "held_mask": None}
        return {**kept, "held": HeldProduct()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = register_source(self)
        self.stored()
