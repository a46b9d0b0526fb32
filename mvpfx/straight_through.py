"""Apply a mask to a weight, with the straight-through gradient of movement pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvpfx.granularity import Granularity, from_matrix, to_matrix
from mvpfx.torch_private import transforms_active


class _StraightThrough(torch.autograd.Function):
    """`W' = W * M`; `dW = dW' * M`; `dS = dW' * W` summed over each unit, masked or not.

    Sanh et al. 2020, Eq. 2: the derivative of the mask with respect to the scores is taken as 1.
    """

    # One forward with ctx: with setup_context, torch binds the arguments anew in each call, which
    # takes longer than masking a small weight.
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor,
        mask: Tensor | None,
        granularity: Granularity,
        out_dim: int,
        parts: int,
    ) -> Tensor:
        ctx.granularity, ctx.out_dim, ctx.parts = granularity, out_dim, parts
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, mask)
        return weight.view_as(weight) if mask is None else weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, mask = ctx.saved_tensors
        weight_grad = score_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = grad if mask is None else grad * mask
        if ctx.needs_input_grad[1]:
            movement = to_matrix(grad.float() * weight.float(), ctx.out_dim, ctx.parts)
            score_grad = ctx.granularity.reduce(movement, ctx.parts)
        return weight_grad, score_grad, None, None, None, None


def apply_mask(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    granularity: Granularity,
    out_dim: int,
    parts: int = 1,
) -> Tensor:
    """The masked weight, in shape and dtype of `weight`.

    Args:
        weight: the parameter.
        scores: `[r, c]` float32, to receive straight-through gradients; None for none.
        mask: bool, of the weight's shape; True = kept. None keeps all of it.
        granularity: of the scores.
        out_dim: which dimension of the weight holds the output features.
        parts: number of matrices that the weight stacks.
    """
    if scores is None or not torch.is_grad_enabled():
        return weight if mask is None else weight * mask
    if not torch.compiler.is_compiling() and transforms_active():
        return _as_plain_operations(weight, scores, mask, granularity, out_dim, parts)
    return _StraightThrough.apply(weight, scores, mask, granularity, out_dim, parts)  # pyright: ignore[reportReturnType]


def _as_plain_operations(
    weight: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    granularity: Granularity,
    out_dim: int,
    parts: int,
) -> Tensor:
    """The same with zeros that carry the gradient, which all transforms of torch.func understand;
    slower and in need of more memory.
    """
    height, width = to_matrix(weight, out_dim, parts).shape
    zeros = granularity.expand(scores - scores.detach(), height, width)
    movement = from_matrix(zeros, weight.shape, out_dim, parts).to(weight.dtype) * weight.detach()
    return (weight if mask is None else weight * mask) + movement
