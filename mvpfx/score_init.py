"""First values of learned scores."""

from __future__ import annotations

import torch
from torch import Tensor

SENSITIVITY, MAGNITUDE, ZERO = "sensitivity", "magnitude", "zero"
"""Words for first scores: measured while nothing is pruned yet, the rank of `abs(W)`, all equal."""
SPREAD = 2.0
"""How far apart the ranks of `abs(W)` are, from the least to the greatest."""
SENSITIVITY_SPREAD = 6.0
"""The same of what was measured: of 2, 6 and 20 the best on dev (SST-2, density 0.05)."""
_BUCKET_BITS = 16
_BUCKETS = 1 << (31 - _BUCKET_BITS)
_CHUNK = 1 << 17  # values at a time: their intermediates stay in a CPU's cache


def initial_scores(values: Tensor, score_init: str | float) -> Tensor:
    """Scores to start from, float32 in the shape of `values`.

    Args:
        values: what stands for each unit, float32 `[r, c]`: the weight itself, or the mean of
            `abs(W)` over a larger unit.
        score_init: "zero" as in the paper, "magnitude" for the rank of `abs(values)` within the
            site in [0, `SPREAD`], "sensitivity" for the same until it is measured, or a number for
            all.
    """
    if score_init in (MAGNITUDE, SENSITIVITY):
        return rank(values).mul_(SPREAD)
    value = 0.0 if score_init == ZERO else float(score_init)
    return torch.full_like(values, value)


def rank(values: Tensor) -> Tensor:
    """Share of `abs(values)` below each one, in [0, 1], float32; equal ones have equal ranks.

    Nothing is sorted. The bits of a float without its sign, read as an integer, order as the float
    does: the upper 15 of 31 choose one of 32,768 buckets, whose counts add up to the rank at its
    lower edge, and the lower 16 interpolate inside it. Up to rounding the result therefore never
    decreases in `abs(values)`; it is off by less than the share of one bucket, which is 1/128 of a
    power of two wide.

    Args:
        values: float32, any shape.
    """
    bits = values.contiguous().view(torch.int32).flatten()
    size = min(_CHUNK, bits.numel())
    bucket, low = (torch.empty(size, dtype=torch.int32, device=bits.device) for _ in range(2))
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=bits.device)
    for part in bits.split(_CHUNK):
        counts += _bucket_of(part, bucket[: len(part)]).bincount(minlength=_BUCKETS)
    share = 1.0 / max(bits.numel(), 1)
    edges = (counts.cumsum(0) - counts).float() * share
    slopes = counts.float() * (share / (1 << _BUCKET_BITS))
    ranks = torch.empty_like(bits, dtype=torch.float32)
    edge = torch.empty(size, device=bits.device)
    for part, out in zip(bits.split(_CHUNK), ranks.split(_CHUNK), strict=True):
        here = slice(len(part))
        _bucket_of(part, bucket[here])
        torch.bitwise_and(part, (1 << _BUCKET_BITS) - 1, out=low[here])
        torch.index_select(edges, 0, bucket[here], out=edge[here])
        torch.index_select(slopes, 0, bucket[here], out=out)
        out.mul_(low[here].float()).add_(edge[here])
    return ranks.view(values.shape)


def _bucket_of(bits: Tensor, out: Tensor) -> Tensor:
    """The upper bits without the sign, written to `out`."""
    return torch.bitwise_right_shift(bits, _BUCKET_BITS, out=out).bitwise_and_(_BUCKETS - 1)
