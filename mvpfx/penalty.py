"""The term that soft criteria add to the loss, to bring their scores down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvpfx.ranking import leading
from mvpfx.scheduler import masks_of


def penalty(model: nn.Module) -> Tensor:
    """Mean over the penalised sites of `lambda(t)` times the mean of `sigmoid(S)` in the site.

    `lambda_mvp * R(S)` of Sanh et al. 2020, section 4. The paper prints a sum over all scores; its
    code, whose recipes give the factors, takes the mean within each weight and then over weights,
    and so does this. `lambda(t)` is 0 at first and rises with the threshold.

    Add it to the loss of every batch; like the loss, divide it by the number of batches where
    gradients are accumulated.

    Args:
        model: a prepared model, or a module that holds one.

    Returns:
        A float32 scalar on the model's device; 0 where no criterion has a penalty.
    """
    masks = [m for m in leading(masks_of(model)) if m.criterion.penalised]
    first = next(model.parameters(), None)
    total = torch.zeros((), device=first.device if first is not None else None)
    for mask in masks:
        mask.penalty_asked = True
        if mask.penalty_lambda:
            term = mask.criterion.penalty(mask) * (mask.penalty_lambda / len(masks))
            total = total + term.to(total.device)
    return total
