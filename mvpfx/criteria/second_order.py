"""Second-order pruning: keep what the loss would miss most, and let the rest make up for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mvpfx import fisher
from mvpfx.criterion import Criterion, Option
from mvpfx.granularity import from_matrix, matrix_shape, to_matrix

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class SecondOrder(Criterion):
    """Optimal BERT Surgeon: Kurtic et al. 2022, after Hassibi and Stork 1992.

    The empirical Fisher matrix of each block of `block` neighbours is a moving average of `g g^T`
    over the gradients `g` of the optimizer steps, without the bias of its first steps, plus
    `damping` on the diagonal (the paper averages over gradients taken anew at each cut). Where the
    density falls, units are ranked by `1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`, summed over a unit's blocks,
    and what stays of each block is moved by `-F^-1 E_Q ([F^-1]_QQ)^-1 w_Q` for all `Q` of it that
    go. Masked weights do not come back.

    The matrices take `block` numbers for each weight, in memory and in checkpoints.
    """

    name = "second_order"
    stored = "buffer"
    observes = "weight"
    averages = ("fisher_scores",)
    cuts = 20
    couples = False
    options: ClassVar[Mapping[str, Option]] = {
        "block": Option(50, least=1, whole=True),
        "damping": Option(1e-7, least=1e-12),
        "beta": Option(0.99, most=0.9999),
    }

    def initial(self, mask: Mask) -> Tensor:
        """What the formula gives before any gradient: `damping / 2 * w^2`, summed over units."""
        square = mask.matrix().float().square()
        return mask.granularity.reduce(square, mask.site.parts) * (mask.option("damping") / 2)

    def average(self, mask: Mask, name: str) -> Tensor:
        """Zeros `[n, b, b]`."""
        size, weight = self._block_size(mask), mask.weight
        return weight.new_zeros((-(-weight.numel() // size), size, size), dtype=torch.float32)

    def observe(self, mask: Mask, gradient: Tensor) -> None:
        """Add one step's gradient of the weight; not once all cuts are made."""
        if mask.density is not None and mask.density > mask.rule.density:
            site = mask.site
            matrix = to_matrix(gradient, site.out_dim, site.parts)
            matrix = mask.granularity.side_by_side(matrix.float())
            blocks = fisher.to_blocks(matrix, self._block_size(mask))
            fisher.add_gradient(mask.averages()[0], blocks, mask.option("beta"))

    def rank(self, mask: Mask, kept: Tensor | None) -> None:
        """Score units by what the loss gains without them; -1 for those that are masked already."""
        assert kept is not None, "it ranks at each cut"
        height, width = matrix_shape(mask.site)
        cols = mask.granularity.block(mask.site)[1]
        size = self._block_size(mask)
        shape = mask.granularity
        stays = shape.side_by_side(shape.expand(kept, height, width))
        bias = self._bias(mask)
        losses = fisher.loss_without(
            mask.averages()[0],
            fisher.to_blocks(shape.side_by_side(mask.matrix().float()), size),
            fisher.to_blocks(stays, size).bool(),
            mask.option("damping") * bias,
            min(cols, size),
        )
        matrix = shape.as_before(fisher.from_blocks(losses / bias, height, width))
        scores = shape.reduce(matrix, mask.site.parts)
        mask.require_scores().copy_(scores.masked_fill(~kept, -1.0))

    def make_up(self, mask: Mask, before: Tensor, after: Tensor) -> None:
        """Move the weights that stay to where the loss rises least."""
        site, size, shape = mask.site, self._block_size(mask), mask.granularity
        height, width = matrix_shape(site)
        was, stays = (
            fisher.to_blocks(shape.side_by_side(shape.expand(kept, height, width)), size).bool()
            for kept in (before, after)
        )
        changes = fisher.compensation(
            mask.averages()[0],
            fisher.to_blocks(shape.side_by_side(mask.matrix().float()), size),
            was & ~stays,
            stays,
            mask.option("damping") * self._bias(mask),
        )
        matrix = shape.as_before(fisher.from_blocks(changes, height, width))
        mask.weight.add_(from_matrix(matrix, site.shape, site.out_dim, site.parts))

    def _block_size(self, mask: Mask) -> int:
        return fisher.block_size(int(mask.option("block")), mask.granularity.block(mask.site)[1])

    def _bias(self, mask: Mask) -> float:
        """What the average has to be divided by, as it started from 0."""
        return 1 - mask.option("beta") ** mask.step
