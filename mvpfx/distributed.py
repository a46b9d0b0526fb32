"""Scores that are sharded over ranks, as `fully_shard` leaves them (FSDP2, `DTensor`).

A forward has the whole scores of its block at hand, so a site that is ranked alone is cut there, on
every rank alike. Sites that are ranked together need a cut through the scores of all of them, which
no rank ever holds: the ranks count their own shards into a histogram, four times, and add the
histograms up. What comes out is how many units each site keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from mvpfx.mask import Mask

BINS = 256
"""Of the histograms: one byte of a float32 is decided a round."""


def is_sharded(value: object) -> bool:
    """Whether `value` is a `DTensor`: this rank's part of a tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(value: Tensor) -> Tensor:
    """The whole of `value` on every rank; itself where it is not sharded. A collective call."""
    whole: Any = value
    return whole.full_tensor() if is_sharded(value) else value


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank has of `like`; itself where that is not sharded."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    shard: Any = like
    return distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)


def check_whole(model: nn.Module) -> None:
    """Make sure that no parameter is sharded.

    Raises:
        ValueError: if one is.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded over ranks, and a converted model is whole. Gather the state "
                "with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load it into the model prepared "
                "in the same way but not sharded, and convert that."
            )


def version(value: Any) -> tuple[int, int]:
    """Where the data of `value` lies, and how often it was written to in place.

    Nobody counts the writes to a `DTensor`: there, steps of any optimizer count instead. That the
    ranks come to the same answer matters as much, since what follows is a collective call.
    """
    if is_sharded(value):
        return value.to_local().data_ptr(), _optimizer_steps()
    return value.data_ptr(), value._version


def _optimizer_steps() -> int:
    """Steps that optimizers of this process took since the first question."""
    if not _steps:
        _steps.append(0)
        register_optimizer_step_post_hook(_count_step)
    return _steps[0]


def _count_step(*_: Any) -> None:
    _steps[0] += 1


_steps: list[int] = []


def mean(value: Tensor) -> Tensor:
    """Differentiable mean over all of `value`, on every rank where it is sharded."""
    return gathered(value.sum()) / value.numel()


def shard_scores(module: nn.Module, **options: Any) -> nn.Module:
    """Shard the scores inside `module` as one FSDP group of their own, in float32.

    Call it for a block, with the mesh, before `fully_shard(block, ...)` with a mixed precision
    policy, which would gather the scores rounded; without such a policy it is not needed.

    Args:
        module: a block of a prepared model.
        options: for `fully_shard`, such as `mesh=`; `mp_policy` is not for scores.

    Returns:
        `module`.

    Raises:
        ValueError: a mixed precision policy is given, or `module` has no scores.
    """
    from torch.distributed.fsdp import fully_shard

    from mvpfx.scheduler import masks_of

    if "mp_policy" in options:
        raise ValueError(
            "scores are ranked in float32, so shard_scores takes no mp_policy; found "
            f"{options['mp_policy']}. Give it to fully_shard(block, ...) alone."
        )
    masks: list[nn.Module] = [mask for mask in masks_of(module) if mask.scores is not None]
    if not masks:
        raise ValueError(
            f"{type(module).__name__} has no scores to shard. Call mvpfx.prepare(model) first, and "
            "shard_scores for blocks that hold sites whose criterion stores scores."
        )
    fully_shard(masks, **options)
    return module


def kept_counts(masks: Sequence[Mask], importances: Sequence[Tensor], count: int) -> list[int]:
    """How many units each mask keeps where the top `count` of all their units stay.

    Equal to counting in `top_v` over all of them: ties go to earlier masks. Radix selection on the
    bits of float32; what is communicated is four histograms and two numbers a mask.

    Args:
        masks: ranked together, in order of their sites; at least one is sharded.
        importances: of each, float32, sharded or whole; whole ones are shared out by slices.
        count: how many units stay.
    """
    share = _Share(masks)
    cut, room = 0, count
    for shift in (24, 16, 8, 0):
        histogram = torch.zeros(BINS, dtype=torch.int64)
        for importance in importances:
            key = _ordered(share.own(importance))
            within = key[(key >> (shift + 8)) == (cut >> (shift + 8))]
            histogram += torch.bincount((within >> shift) & (BINS - 1), minlength=BINS).cpu()
        above = share.total(histogram).flip(0).cumsum(0)
        place = int(torch.searchsorted(above, room))
        room -= int(above[place - 1]) if place else 0
        cut |= (BINS - 1 - place) << shift
    keys = (_ordered(share.own(importance)) for importance in importances)
    own = [[int((key > cut).sum()), int((key == cut).sum())] for key in keys]
    counts: list[int] = []
    for greater, equal in share.total(torch.tensor(own)).tolist():
        tied = min(room, equal)
        room -= tied
        counts.append(greater + tied)
    return counts


def _ordered(values: Tensor) -> Tensor:
    """Whole numbers from 0 to 2^32 - 1 in the order of the float32 `values`; -0 equals 0."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31)) if bits.numel() else bits


class _Share:
    """Who counts what: the mesh of the sharded masks, and this rank's place on it."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        shards: list[Any] = [mask.shard for mask in masks if mask.shard is not None]
        self.mesh = shards[0].device_mesh
        self.placements = shards[0].placements
        for mask in masks:
            shard: Any = mask.shard
            if shard is not None and (shard.device_mesh, shard.placements) != (
                self.mesh,
                self.placements,
            ):
                raise ValueError(
                    f"{mask.site.name} is sharded over {shard.device_mesh} as {shard.placements}, "
                    f"and {masks[0].site.name} over {self.mesh} as {self.placements}, but they are "
                    'ranked together. Use one mesh for both, or scope="local".'
                )
        dims = [i for i, placement in enumerate(self.placements) if placement.is_shard()]
        self.parts = [(self.mesh.size(i), self.mesh.get_local_rank(i)) for i in dims]

    def own(self, importance: Any) -> Tensor:
        """What this rank counts of `importance`, flat; every unit is counted by one shard."""
        if is_sharded(importance):
            return importance.to_local().flatten()
        mine = importance.flatten()
        for parts, place in self.parts:
            mine = mine.tensor_split(parts)[place]
        return mine

    def total(self, counted: Tensor) -> Tensor:
        """The sum of `counted` over all shards."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial() if p.is_shard() else Replicate() for p in self.placements]
        local = counted.to(self.mesh.device_type)
        summed: Any = DTensor.from_local(local, self.mesh, placements, run_check=False)
        return summed.full_tensor().cpu()
