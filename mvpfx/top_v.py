"""Exact top-v: the greatest of all scores, and nothing more, ties included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvpfx.torch_private import is_fake


def top_v(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` greatest of all scores; ties go to earlier tensors, then lower flat index.

    Top_v of Sanh et al. 2020, Eq. 1, made exact: nothing is sorted, the cut is selected, and only
    the scores equal to it are counted out.

    >>> top_v([torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 1.0]])], 2)
    [tensor([True, True]), tensor([[False, False]])]

    Args:
        scores: float tensors of any shape, without NaN.
        count: how many to mark, from 0 to the number of all scores.

    Returns:
        A bool tensor for each of `scores`, of its shape and device.
    """
    total = sum(part.numel() for part in scores)
    if count >= total or count <= 0:
        return [torch.full_like(part, count > 0, dtype=torch.bool) for part in scores]
    device = scores[0].device
    flat = torch.cat([part.flatten().to(device) for part in scores])
    if device.type == "cpu" and flat.dtype == torch.float32 and not is_fake(flat):
        # In place on the copy made above; ten times as fast as kthvalue on a CPU.
        flat.numpy().partition(total - count)
        cut = flat[total - count].clone()
        if flat[: total - count].max() < cut:
            return [part >= cut.to(part.device) for part in scores]
    else:
        cut = flat.kthvalue(total - count + 1).values
    del flat
    return _count_out_ties(scores, cut, count)


def _count_out_ties(scores: Sequence[Tensor], cut: Tensor, count: int) -> list[Tensor]:
    """Mark what is above `cut`, and of what equals it the first ones, `count` in all."""
    above = [part > cut.to(part.device) for part in scores]
    room = torch.tensor(count, device=cut.device)
    for greater in above:
        room = room - greater.sum().to(cut.device)
    kept: list[Tensor] = []
    for part, greater in zip(scores, above, strict=True):
        tied = (part == cut.to(part.device)).flatten()
        before = tied.cumsum(0, dtype=torch.int32 if tied.numel() < 2**31 else torch.int64)
        chosen = tied & (before <= room.to(part.device))
        room = room - chosen.sum().to(room.device)
        kept.append(greater | chosen.view(greater.shape))
    return kept
