"""Layout: how a weight of any rank is seen as a matrix of units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mvpfx.granularity import Granularity, to_matrix


@dataclass(frozen=True)
class Layout:
    """How a weight is seen as a matrix, and what its units are.

    Attributes:
        granularity: of the scores.
        out_dim: which dimension of the weight holds the output features.
        parts: number of matrices that the weight stacks.
    """

    granularity: Granularity
    out_dim: int = 0
    parts: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight` as `[outputs, inputs]`."""
        return to_matrix(weight, self.out_dim, self.parts)

    def units(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Number of units along (outputs, inputs) of such a matrix, and the sizes of one; where a
        unit lies in one place.
        """
        rows = self.granularity.rows or height // self.parts
        cols = self.granularity.cols or width
        return (height // rows, width // cols), (rows, cols)
