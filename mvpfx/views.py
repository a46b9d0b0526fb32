"""Masks and scores of a prepared model by site, to look at."""

from __future__ import annotations

from torch import Tensor, nn

from mvpfx.scheduler import masks_of
from mvpfx.state import state_of


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a prepared model computes with now.

    Returns:
        Name of the weight -> bool tensor of its shape, True where a weight is kept. These are
        copies: writing to them changes nothing.

    Raises:
        ValueError: the model is not prepared, or scores hold NaN.

    Example:
        >>> import mvpfx
        >>> model = mvpfx.prepare(nn.Sequential(nn.Linear(4, 2)), density=0.5)
        >>> {name: tuple(mask.shape) for name, mask in masks(model).items()}
        {'0.weight': (2, 4)}
    """
    state_of(model)
    return {mask.site.name: mask.mask().clone() for mask in masks_of(model)}


def scores(model: nn.Module) -> dict[str, Tensor]:
    """The scores that a prepared model has learned or accumulated so far.

    Returns:
        Name of the weight -> float32 tensor with one score per unit, `[r, c]` units along outputs
        and inputs. Weights whose criterion stores no scores, as magnitude, are left out. These are
        copies: writing to them changes nothing.

    Raises:
        ValueError: the model is not prepared.
    """
    state_of(model)
    stored = {mask.site.name: mask.scores for mask in masks_of(model)}
    return {name: found.detach().clone() for name, found in stored.items() if found is not None}
