"""Checks of single values and weights that users pass in, each with its message."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from mvpfx.distributed import gathered, is_sharded
from mvpfx.site import Site
from mvpfx.torch_private import is_fake

MASKABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be masked."""


def as_number(value: object, name: str) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: if it is no number (a bool is none).
        ValueError: if it is NaN or infinite.
    """
    number = _as_float(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; found {value!r}.")
    return number


def as_density(value: object, name: str = "density") -> float:
    """`value` as a fraction of units kept, above 0 and at most 1.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or NaN.
    """
    number = _as_float(value, name)
    if not 0 < number <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1: it is the fraction of units kept; "
            f'found {value!r}. To leave a weight alone, use overrides={{"its name": None}}.'
        )
    return number


def as_count(value: object, name: str, least: int = 1) -> int:
    """`value` as a whole number of at least `least`.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are too
        raise TypeError(f"{name} must be a whole number; found {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; found {value}.")
    return int(value)


def _as_float(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; found {value!r} ({type(value).__name__}).")
    return float(value)


def check_weight(site: Site, weight: Tensor) -> None:
    """Make sure that a weight can be pruned: floating point, with values, none of them NaN.

    Raises:
        TypeError: if its dtype cannot be masked.
        ValueError: if it is on the meta device or holds NaN.
    """
    left_out = f'overrides={{"{site.module_name or site.name}": None}}'
    if is_sharded(weight):
        raise ValueError(
            f"{site.name} is sharded over ranks already, and scores start from the whole weight. "
            "Call mvpfx.prepare before fully_shard."
        )
    if weight.dtype not in MASKABLE:
        needed = ", ".join(str(dtype).removeprefix("torch.") for dtype in MASKABLE)
        found = str(weight.dtype).removeprefix("torch.")
        raise TypeError(
            f"{site.name} holds {found} values, and a mask needs one of {needed}. "
            f"Prune before quantising, or leave the site out: {left_out}"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{site.name} is on the meta device and has no values to prune. "
            "Load the model's weights first, then call prepare."
        )
    count = count_nan(weight)
    if count:
        raise ValueError(
            f"{site.name} has {count} NaN among its {weight.numel()} weights. "
            f"Load sound weights before calling prepare, or leave the site out: {left_out}"
        )


def check_scores_dtype(site: Site, scores: Tensor | None) -> None:
    """Make sure that scores are float32: rounded, they would be ranked by chance.

    Raises:
        ValueError: if they are not.
    """
    if scores is not None and scores.dtype != torch.float32:
        found = str(scores.dtype).removeprefix("torch.")
        raise ValueError(
            f"the scores of {site.name} are {found}, and only float32 ranks them exactly. Leave "
            "them out of what casts parameters; for fully_shard with a mixed precision policy call "
            "mvpfx.distributed.shard_scores(block, mesh=mesh) before fully_shard(block, ...)."
        )


def check_finite(site: Site, values: Tensor, what: str) -> None:
    """Make sure that what decides a mask is no NaN.

    Args:
        site: whose mask it is.
        values: scores, or weights.
        what: which of these, for the message.

    Raises:
        ValueError: if one is NaN; the message names the site.
    """
    count = count_nan(values)
    if count:
        raise ValueError(
            f"{site.name} has {count} NaN among the {values.numel()} {what} that decide its "
            "mask. Training has diverged: lower lr or score_lr, clip the gradients, "
            "or go back to an earlier checkpoint."
        )


def count_nan(values: Tensor) -> int:
    """How many of `values` are NaN: one sum where none is. Fake tensors have none."""
    values = gathered(values.detach())
    if is_fake(values) or not math.isnan(values.sum()):
        return 0
    return int(torch.isnan(values).sum())
