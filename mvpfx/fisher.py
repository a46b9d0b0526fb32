"""Blockwise empirical Fisher: how weights that lie side by side matter to the loss together.

A weight seen as `[outputs, inputs]` is read row by row and cut into blocks of neighbours; the
Fisher matrix is that of each block alone (Kurtic et al. 2022, section 3.2). Everything here works
on whole tensors of blocks: `[n, b]` for what each weight has, `[n, b, b]` for the matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 4096  # blocks at a time: their inverses are not kept
_ROUNDING = 1e-6  # of a block's largest diagonal entry: what float32 needs to factor it


def block_size(wanted: int, cols: int) -> int:
    """Neighbours in one block where units have `cols` inputs: a block holds whole units, or a unit
    whole blocks, so it is the greatest such size up to `wanted`.

    >>> block_size(50, 1), block_size(50, 4), block_size(50, 768)
    (50, 48, 48)
    """
    if cols <= wanted:
        return wanted // cols * cols
    return max(size for size in range(1, wanted + 1) if cols % size == 0)


def to_blocks(matrix: Tensor, size: int) -> Tensor:
    """Read `[outputs, inputs]` row by row into `[n, size]`, with zeros at the end."""
    flat = matrix.reshape(-1)
    return functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def from_blocks(blocks: Tensor, height: int, width: int) -> Tensor:
    """The way back of `to_blocks`."""
    return blocks.reshape(-1)[: height * width].view(height, width)


def add_gradient(fisher: Tensor, gradient: Tensor, beta: float) -> None:
    """`F = beta * F + (1 - beta) * g g^T` in place: `[n, b, b]` and `[n, b]`."""
    column, row = gradient[:, :, None], gradient[:, None, :]
    torch.baddbmm(fisher, column, row, beta=beta, alpha=1 - beta, out=fisher)


def loss_without(
    fisher: Tensor, weights: Tensor, kept: Tensor, damping: float, cols: int
) -> Tensor:
    """What the loss gains when a piece of `cols` neighbours goes and the others make up for it.

    `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q` of Kurtic et al. 2022, Eq. 4; for single weights the
    `w^2 / (2 [F^-1]_qq)` of Hassibi and Stork 1992. What is masked already is out of `F`.

    Args:
        fisher: `[n, b, b]`.
        weights: `[n, b]`.
        kept: which are not masked, `[n, b]`.
        damping: added to the diagonal.
        cols: divides `b`.

    Returns:
        `[n, b]`: the loss of a piece, shared out evenly to its weights; 0 where masked.
    """
    losses = torch.empty_like(weights)
    size = weights.shape[1]
    for part in _chunks(len(weights)):
        factor = _factor(fisher[part], kept[part], damping)
        inverse = torch.cholesky_inverse(factor)
        w = (weights[part] * kept[part]).view(-1, size // cols, cols)
        if cols == 1:
            diagonal = inverse.diagonal(dim1=1, dim2=2)
            losses[part] = w.squeeze(2).square() / (2 * diagonal)
            continue
        pieces = inverse.view(-1, size // cols, cols, size // cols, cols)
        pieces = pieces.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        solved = torch.linalg.solve(pieces, w)
        loss = (w * solved).sum(2, keepdim=True) / (2 * cols)
        losses[part] = loss.expand(w.shape).reshape(-1, size)
    return losses


def compensation(
    fisher: Tensor, weights: Tensor, gone: Tensor, kept: Tensor, damping: float
) -> Tensor:
    """What to add to the weights that stay, so that the loss rises least when others go.

    `-F^-1 E_Q ([F^-1]_QQ)^-1 w_Q` of Kurtic et al. 2022, Eq. 5, for all of `Q` together, written
    as `F_RR^-1 F_RQ w_Q` for the rest `R`, which is the same.

    Args:
        fisher: `[n, b, b]`.
        weights: `[n, b]`, as before the cut.
        gone: which are masked by this cut, `[n, b]`.
        kept: which stay after it, `[n, b]`.
        damping: added to the diagonal.

    Returns:
        `[n, b]`, 0 where nothing stays or goes.
    """
    changes = torch.zeros_like(weights)
    touched = (gone.any(1) & kept.any(1)).nonzero().squeeze(1)
    for part in _chunks(len(touched)):
        rows = touched[part]
        matrix, stays = fisher[rows], kept[rows]
        pull = torch.bmm(matrix, (weights[rows] * gone[rows])[:, :, None]) * stays[:, :, None]
        factor = _factor(matrix, stays, damping)
        changes[rows] = torch.cholesky_solve(pull, factor).squeeze(2) * stays
    return changes


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))


def _factor(fisher: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Cholesky factor of the damped matrices of what is kept; masked weights stand alone."""
    stays = kept.to(fisher.dtype)
    matrix = fisher * stays[:, :, None] * stays[:, None, :]
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += (_ROUNDING * diagonal.amax(1, keepdim=True)).clamp_min(damping)
    return torch.linalg.cholesky(matrix)
