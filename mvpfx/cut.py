"""Cut: the step at which a density falls, where criteria rank anew or make up for what goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from mvpfx.distributed import is_sharded

if TYPE_CHECKING:
    from mvpfx.mask import Mask


@torch.no_grad()
def cut(masks: Sequence[Mask], move: Callable[[], None]) -> None:
    """Move all masks; where that lowers a density, rank anew first, and make up for what goes.

    Args:
        masks: those whose criterion has `cuts`, or whose first scores are measured.
        move: takes all masks of the model to the next step of their schedules.
    """
    before = [
        (mask, mask.density, mask.kept() if _makes_up(mask) else None)
        for mask in masks
        if _makes_up(mask) or mask.measuring
    ]
    move()
    falling = [(mask, kept) for mask, density, kept in before if mask.density != density]
    for mask, kept in falling:
        mask.criterion.rank(mask, kept)
    whole = [(mask, kept) for mask, kept in falling if kept is not None]
    after = [mask.kept() for mask, _ in whole]
    for (mask, kept), stays in zip(whole, after, strict=True):
        mask.criterion.make_up(mask, kept, stays)


def _makes_up(mask: Mask) -> bool:
    return mask.criterion.cuts is not None


def check_cuts(masks: Sequence[Mask], total_steps: int) -> None:
    """Make sure that masks can be cut; warn where that is to happen all the time.

    Raises:
        ValueError: if a weight is sharded.
    """
    masks = [mask for mask in masks if _makes_up(mask)]
    for mask in masks:
        if is_sharded(mask.weight):
            raise ValueError(
                f"{mask.site.name} is sharded over ranks, and {mask.rule.criterion} looks at whole "
                "weights. Use DDP, or another criterion."
            )
    plan = masks[0].plan if masks else None
    if plan is None:
        return
    cuts = len(plan.moves(total_steps))
    wanted = masks[0].criterion.cuts or 1
    if cuts > 5 * wanted:
        warnings.warn(
            f"{masks[0].rule.criterion} solves for its weights at each of {cuts} cuts, which takes "
            f"long. Give the schedule fewer, such as CubicSchedule(cuts={wanted}).",
            stacklevel=3,
        )
