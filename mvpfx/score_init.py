"""First values of learned scores."""

from __future__ import annotations

import torch
from torch import Tensor

_BUCKET_BITS = 16
_BUCKETS = 1 << (31 - _BUCKET_BITS)


def initial_scores(magnitude: Tensor, score_init: str | float) -> Tensor:
    """Scores to start from, float32 in the shape of `magnitude`.

    Args:
        magnitude: mean `abs(W)` of each unit, float32 `[r, c]`.
        score_init: "zero" as in the paper, "magnitude" for the rank of `magnitude` within the
            site in [0, 2], or a number for all.
    """
    if score_init == "magnitude":
        return rank(magnitude).mul_(2.0)
    value = 0.0 if score_init == "zero" else float(score_init)
    return torch.full_like(magnitude, value)


def rank(values: Tensor) -> Tensor:
    """Share of `values` below each one, in [0, 1], float32; equal values have equal ranks.

    Nothing is sorted. The bits of a non-negative float, read as an integer, order as the float
    does: the upper 15 of 31 choose one of 32,768 buckets, whose counts add up to the rank at its
    lower edge, and the lower 16 interpolate inside it. Up to rounding the result therefore never
    decreases in `values`; it is off by less than the share of one bucket, which is 1/128 of a
    power of two wide.

    Args:
        values: float32, at least 0, any shape.
    """
    bits = values.contiguous().view(torch.int32).flatten()
    bucket = bits >> _BUCKET_BITS
    inside = (bits & ((1 << _BUCKET_BITS) - 1)).float()
    counts = torch.bincount(bucket, minlength=_BUCKETS)
    share = 1.0 / max(bits.numel(), 1)
    edges = (counts.cumsum(0) - counts).float() * share
    slopes = counts.float() * (share / (1 << _BUCKET_BITS))
    ranks = slopes.index_select(0, bucket).mul_(inside).add_(edges.index_select(0, bucket))
    return ranks.view(values.shape)
