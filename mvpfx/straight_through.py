"""Apply a mask to a weight, with the straight-through gradient of movement pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvpfx.granularity import Granularity, from_matrix, to_matrix
from mvpfx.recomputing import product, remember
from mvpfx.torch_private import transforms_active
from mvpfx.training_kernels import library


class _MaskedWeight(torch.autograd.Function):
    """`W' = W * M`; `dW = dW' * M`; `dS = dW' * W` summed over each unit, masked or not.

    Sanh et al. 2020, Eq. 2: the derivative of the mask with respect to the scores is taken as 1.
    Autograd adds up the gradients of all uses of `W'` before they come here, so `dW'` is read once.
    """

    # One forward with ctx: with setup_context, torch binds the arguments anew in each call, which
    # takes longer than masking a small weight.
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor | None,
        mask: Tensor | None,
        granularity: Granularity,
        out_dim: int,
        parts: int,
    ) -> Tensor:
        ctx.granularity, ctx.out_dim, ctx.parts = granularity, out_dim, parts
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, mask)
        if mask is None:
            return weight.view_as(weight)
        if torch.compiler.is_compiling():
            return weight * mask
        masked = product(weight, mask)
        remember(masked, weight, mask)
        return masked

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, mask = ctx.saved_tensors
        trains, learns = ctx.needs_input_grad[:2]
        native = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        weight_grad = score_grad = None
        if trains and learns and mask is not None and native:
            both = _both(grad, weight, mask, ctx.granularity, ctx.out_dim, ctx.parts)
            if both is not None:
                return *both, None, None, None, None
        if trains:
            weight_grad = grad if mask is None else (product if native else torch.mul)(grad, mask)
        if learns:
            score_grad = _movement(grad, weight, ctx.granularity, ctx.out_dim, ctx.parts)
        return weight_grad, score_grad, None, None, None, None


def _both(
    grad: Tensor, weight: Tensor, mask: Tensor, granularity: Granularity, out_dim: int, parts: int
) -> tuple[Tensor, Tensor] | None:
    """The gradients of weight and scores in one pass; None where the library does not serve."""
    if not library.serves(grad, weight, mask):
        return None
    if granularity.is_element:
        weight_grad, movement = library.gradients(grad, weight, mask)
        return weight_grad, to_matrix(movement, out_dim, parts)
    matrix = to_matrix(grad, out_dim, parts)
    if granularity.copies > 1 or matrix.data_ptr() != grad.data_ptr() or not matrix.is_contiguous():
        return None
    height, width = matrix.shape
    rows, cols = granularity.rows or height // parts, granularity.cols or width
    units = (height // rows, width // cols)
    return library.block_gradients(grad, weight, mask, units, (rows, cols))


def _movement(
    grad: Tensor, weight: Tensor, granularity: Granularity, out_dim: int, parts: int
) -> Tensor:
    """`dW' * W` in float32, summed over each unit: `[r, c]`."""
    return granularity.reduce(to_matrix(grad.float() * weight.float(), out_dim, parts), parts)


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
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled():
        return weight if mask is None else weight * mask if compiling else product(weight, mask)
    if scores is None and (mask is None or compiling):
        return weight if mask is None else weight * mask
    if not compiling and transforms_active():
        return _as_plain_operations(weight, scores, mask, granularity, out_dim, parts)
    return _MaskedWeight.apply(weight, scores, mask, granularity, out_dim, parts)  # pyright: ignore[reportReturnType]


def _as_plain_operations(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    granularity: Granularity,
    out_dim: int,
    parts: int,
) -> Tensor:
    """The same with zeros that carry the gradient, which all transforms of torch.func understand;
    slower and in need of more memory.
    """
    masked = weight if mask is None else weight * mask
    if scores is None:
        return masked
    height, width = to_matrix(weight, out_dim, parts).shape
    zeros = granularity.expand(scores - scores.detach(), height, width)
    movement = from_matrix(zeros, weight.shape, out_dim, parts).to(weight.dtype) * weight.detach()
    return masked + movement
