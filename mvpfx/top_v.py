"""Exact top-v: the greatest of all scores, and nothing more, ties included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvpfx.selection import FEW, NOT_RANKED, Cut, find_cut
from mvpfx.torch_private import is_fake
from mvpfx.training_kernels import library


def top_v(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` greatest of all scores; ties go to earlier tensors, then lower flat index.

    Top_v of Sanh et al. 2020, Eq. 1, made exact: nothing is sorted, the cut is selected, and only
    the scores equal to it are counted out. On an accelerator nothing waits for it.

    >>> top_v([torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 1.0]])], 2)
    [tensor([True, True]), tensor([[False, False]])]

    Args:
        scores: float tensors of any shape, without NaN.
        count: how many to mark, from 0 to the number of all scores.

    Returns:
        A bool tensor for each of `scores`, of its shape and device.

    Raises:
        ValueError: if a score on the CPU is NaN, and some but not all are to be marked.
    """
    total = sum(part.numel() for part in scores)
    if count >= total or count <= 0:
        return [torch.full_like(part, count > 0, dtype=torch.bool) for part in scores]
    if any(part.device.type != "cpu" or is_fake(part) for part in scores):
        return _on_accelerator(scores, count, total)
    if len(scores) == 1 and total <= FEW and library.serves(scores[0]):
        marked = library.top(scores[0].detach(), count)
        if marked is None:
            raise ValueError(NOT_RANKED)
        return [marked]
    wide = torch.float64 if scores[0].dtype == torch.float64 else torch.float32
    flat = [part.detach().to(wide).reshape(-1) for part in scores]
    cut = find_cut(flat, count)
    found = _at_least(flat, cut.value) if cut.room == cut.tied else _first_ties(flat, cut)
    return [mark.view_as(part) for mark, part in zip(found, scores, strict=True)]


_CHUNK = 1 << 17  # scores at a time whose ties are looked for


def _at_least(scores: Sequence[Tensor], cut: float) -> list[Tensor]:
    return [library.at_least(p, cut) if library.serves(p) else p >= cut for p in scores]


def _first_ties(scores: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    """Mark what is above the cut, and as many of what equals it as there is room for."""
    room, kept = cut.room, [part > cut.value for part in scores]
    for part, marked in zip(scores, kept, strict=True):
        for chunk, out in zip(part.split(_CHUNK), marked.split(_CHUNK), strict=True):
            if not room:
                return kept
            tied = (chunk == cut.value).nonzero().squeeze(1)[:room]
            out[tied] = True
            room -= len(tied)
    return kept


def _on_accelerator(scores: Sequence[Tensor], count: int, total: int) -> list[Tensor]:
    """The same without any number being read back: whether there are ties is not asked."""
    device = scores[0].device
    flat = torch.cat([part.detach().flatten().to(device) for part in scores])
    if 2 * count <= total:
        cut = flat.topk(count, sorted=False).values.min()
    else:
        cut = flat.topk(total - count + 1, largest=False, sorted=False).values.max()
    del flat
    return _count_out_ties(scores, cut, count)


def _count_out_ties(scores: Sequence[Tensor], cut: Tensor, count: int) -> list[Tensor]:
    """Mark what is above `cut`, and of what equals it the first ones, `count` in all."""
    above = [part > cut.to(part.device) for part in scores]
    room = torch.full((), count, device=cut.device)
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
