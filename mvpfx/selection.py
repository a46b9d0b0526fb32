"""Selection: the value of the k-th greatest of many scores, exactly, in about one pass over them.

A sample says between which two values the cut must nearly surely lie. One pass counts what is above
them and takes out what is between: a percent or so, among which the same is done again, until few
enough are left to be partitioned. Where the sample was wrong the counts say so, and the bracket
moves: the result never hangs on luck, only the time does. Nothing is sorted, and no more than a
thirty-second of the scores is ever copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvpfx.training_kernels import library

FEW = 1 << 13
"""As many are copied and partitioned at once."""
SAMPLE, LEAST_SAMPLE = 1 << 15, 1 << 10
"""Scores in a sample: a sixty-fourth of all, within these bounds."""
MARGIN = 4.0
"""Standard deviations of the sample's quantile between it and the ends of the bracket."""
_CHUNK = 1 << 17  # scores at a time: what is computed of them stays in a CPU's cache
_offsets = torch.rand(SAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Cut(NamedTuple):
    """Where a selection ends.

    Attributes:
        value: the least score that is selected.
        room: how many of those equal to it are.
        tied: how many there are.
    """

    value: float
    room: int
    tied: int


class _Split(NamedTuple):
    """How many scores are above a bracket, how many inside, and these, as far as they fit."""

    above: int
    found: int
    inside: Tensor


def find_cut(scores: Sequence[Tensor], count: int) -> Cut:
    """The cut below the `count` greatest of all scores.

    Args:
        scores: flat float32 or float64 tensors on the CPU.
        count: from 1 to the number of all scores.

    Raises:
        ValueError: if a score is NaN.
    """
    total = sum(part.numel() for part in scores)
    if total <= FEW:
        return _partitioned(torch.cat(list(scores)), count)
    capacity = max(8 * FEW, total // 32)
    least, most = -math.inf, math.inf  # the cut is known to be within
    low, high = _bracket(scores, count, total)
    overflows = 0
    while True:
        split = _split(scores, low, high, capacity)
        if count <= split.above:
            least = _next(high, math.inf, scores[0].dtype)
            low, high = least, most
        elif count > split.above + split.found:
            most = _next(low, -math.inf, scores[0].dtype)
            low, high = least, most
        elif low == high:
            return Cut(low, count - split.above, split.found)
        elif split.found <= capacity:
            inside, place = split.inside[: split.found], count - split.above
            fewer = 2 * split.found <= total
            return find_cut([inside], place) if fewer else _partitioned(inside, place)
        else:
            least, most = low, high
            low, high = _narrower(low, high, scores[0].dtype, ends=overflows % 2 == 0)
            overflows += 1


def _partitioned(values: Tensor, count: int) -> Cut:
    """The cut of few values, in their place."""
    _refuse_nan(values)
    array: Any = values.numpy()
    array.partition(array.size - count)
    value = array[-count]
    greater, tied = int((array > value).sum()), int((array == value).sum())
    return Cut(float(value), count - greater, tied)


def _bracket(scores: Sequence[Tensor], count: int, total: int) -> tuple[float, float]:
    """Two values between which the cut nearly surely lies, by a sample that is the same each time.

    Each stretch of equal length gives one of its scores, so that no pattern in their order counts.
    """
    wanted = min(SAMPLE, max(LEAST_SAMPLE, total // 64))
    taken: list[Tensor] = []
    for part in scores:
        share = min(SAMPLE, math.ceil(wanted * part.numel() / total))
        places = torch.arange(share, dtype=torch.float64).add_(_offsets[:share])
        places = places.mul_(part.numel() / max(share, 1)).long().clamp_(max=part.numel() - 1)
        taken.append(part.index_select(0, places))
    sample: Any = torch.cat(taken).numpy()
    size, share = sample.size, count / total
    margin = MARGIN * math.sqrt(size * share * (1 - share)) + 1
    lower = math.floor(size * (1 - share) - margin)
    upper = math.ceil(size * (1 - share) + margin)
    places = [place for place in (lower, upper) if 0 <= place < size]
    sample.partition(places)
    low = float(sample[lower]) if lower >= 0 else -math.inf
    high = float(sample[upper]) if upper < size else math.inf
    return (-math.inf, math.inf) if math.isnan(low) or math.isnan(high) else (low, high)


def _split(scores: Sequence[Tensor], low: float, high: float, capacity: int) -> _Split:
    """One pass: count what is above the bracket, take out what is in it."""
    above = found = 0
    inside = torch.empty(capacity, dtype=scores[0].dtype)
    for part in scores:
        if library.serves(part):
            greater, between = library.split(part, low, high, inside[min(found, capacity) :])
            if between < 0:
                raise ValueError(NOT_RANKED)
            above, found = above + greater, found + between
            continue
        for chunk in part.split(_CHUNK):
            _refuse_nan(chunk)
            above += int((chunk > high).count_nonzero())
            chosen = chunk[(chunk >= low) & (chunk <= high)]
            fits = chosen[: max(capacity - found, 0)]
            inside[found : found + len(fits)] = fits
            found += len(chosen)
    return _Split(above, found, inside)


def _narrower(low: float, high: float, dtype: torch.dtype, ends: bool) -> tuple[float, float]:
    """A bracket inside of one that holds too many: without its ends, where these may be what so
    many are equal to; else its upper half, by the number of floats in it.
    """
    if ends and _next(low, math.inf, dtype) < high:
        return _next(low, math.inf, dtype), _next(high, -math.inf, dtype)
    middle = (_place(low, dtype) + _place(high, dtype) + 1) // 2
    return _value(middle, dtype), high


def _next(value: float, towards: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype).nextafter(torch.tensor(towards, dtype=dtype)))


def _place(value: float, dtype: torch.dtype) -> int:
    """The place of a float among all floats of its dtype; that of 0 is 0."""
    number = np.abs(value) if value else 0.0
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    place = int(torch.tensor(number, dtype=dtype).view(whole))
    return -place if value < 0 else place


def _value(place: int, dtype: torch.dtype) -> float:
    """The way back of `_place`."""
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    number = float(torch.tensor(abs(place), dtype=whole).view(dtype))
    return -number if place < 0 else number


NOT_RANKED = "scores are NaN, which have no rank."


def _refuse_nan(values: Tensor) -> None:
    if values.sum().isnan() and values.isnan().any():
        raise ValueError(NOT_RANKED)
