"""Apply a mask to a weight, with the straight-through gradient of movement pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvpfx.granularity import from_matrix
from mvpfx.recomputing import product, remember
from mvpfx.torch_private import transforms_active
from mvpfx.traces import is_traced
from mvpfx.training_kernels import library
from mvpfx.weight_layout import Layout


class _MaskedWeight(torch.autograd.Function):
    """`W' = W * M`; `dW = dW' * M`; `dS = dW' * W` summed over each unit, masked or not.

    Sanh et al. 2020, Eq. 2: the derivative of the mask with respect to the scores is taken as 1.
    Autograd adds up the gradients of all uses of `W'` before they come here, so `dW'` is read once.
    With `whole`, `dW = dW'`: what the scores make of it, and the mask, come later.
    """

    # One forward with ctx: with setup_context, torch binds the arguments anew in each call, which
    # takes longer than masking a small weight.
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor | None,
        mask: Tensor | None,
        layout: Layout,
        whole: bool,
        done: Callable[[], None] | None,
    ) -> Tensor:
        ctx.layout, ctx.whole, ctx.done = layout, whole, done
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, None if whole else mask)
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
        if ctx.done is not None and not torch.compiler.is_compiling():
            ctx.done()
        if trains and learns:
            return *both_gradients(grad, weight, mask, ctx.layout), None, None, None, None
        weight_grad = _masked(grad, mask) if trains else None
        score_grad = _movement(grad, weight, ctx.layout) if learns else None
        return weight_grad, score_grad, None, None, None, None


def both_gradients(
    grad: Tensor, weight: Tensor, mask: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`dW' * M`, of the weight's shape, and `dW' * W` summed over each unit, float32 `[r, c]`.

    Args:
        grad: `dW'`, in shape and dtype of the weight.
        weight: the parameter.
        mask: bool, of the weight's shape; None keeps all of it.
        layout: how the weight is seen as a matrix, and what its units are.
    """
    if mask is not None and not _is_recorded() and library.serves(grad, weight, mask):
        if layout.granularity.is_element:
            weight_grad, movement = library.gradients(grad, weight, mask)
            return weight_grad, layout.matrix(movement)
        matrix = layout.matrix(grad)
        whole = layout.granularity.copies == 1 and layout.granularity.places == 1
        if whole and _is_same(matrix, grad):
            units, block = layout.units(*matrix.shape)
            return library.block_gradients(grad, weight, mask, units, block)
    return _masked(grad, mask), _movement(grad, weight, layout)


def _masked(grad: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return grad
    return grad * mask if _is_recorded() else product(grad, mask)


def _movement(grad: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    matrix = layout.matrix(grad.float() * weight.float())
    return layout.granularity.reduce(matrix, layout.parts)


def _is_recorded() -> bool:
    """Whether operations are traced, or differentiated once more."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _is_same(matrix: Tensor, tensor: Tensor) -> bool:
    """Whether `matrix` is `tensor` in another shape, its values in the same order."""
    return matrix.is_contiguous() and matrix.data_ptr() == tensor.data_ptr()


def apply_mask(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    layout: Layout,
    whole: bool = False,
    done: Callable[[], None] | None = None,
) -> Tensor:
    """The masked weight, in shape and dtype of `weight`.

    Args:
        weight: the parameter.
        scores: `[r, c]` float32, to receive straight-through gradients; None for none.
        mask: bool, of the weight's shape; True = kept. None keeps all of it.
        layout: how the weight is seen as a matrix, and what its units are.
        whole: whether the weight receives the whole gradient of the masked weight, not `dW' * M`.
        done: called when the backward pass needs the mask no more; not where it is compiled.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and is_traced():  # alike with and without gradients, which torch.jit compares
        return _as_plain_operations(weight, scores, mask, layout, whole)
    if not torch.is_grad_enabled():
        return weight if mask is None else weight * mask if compiling else product(weight, mask)
    if scores is None and mask is None:
        return weight
    if not compiling and transforms_active():
        return _as_plain_operations(weight, scores, mask, layout, whole)
    if scores is None and compiling and mask is not None and not whole:
        return weight * mask
    done = None if compiling else done
    return _MaskedWeight.apply(weight, scores, mask, layout, whole, done)  # pyright: ignore[reportReturnType]


def _as_plain_operations(
    weight: Tensor, scores: Tensor | None, mask: Tensor | None, layout: Layout, whole: bool
) -> Tensor:
    """The same with zeros that carry the gradient, which all transforms of torch.func and all
    traces understand; slower and in need of more memory.
    """
    masked = weight if mask is None else weight * mask
    if whole:
        masked = masked.detach() + (weight - weight.detach())
    if scores is None:
        return masked
    height, width = layout.matrix(weight).shape
    zeros = layout.granularity.expand(scores - scores.detach(), height, width)
    movement = from_matrix(zeros, weight.shape, layout.out_dim, layout.parts).to(weight.dtype)
    return masked + movement * weight.detach()
