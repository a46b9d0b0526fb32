"""Movement pruning as the paper's text has it, module by module: what the cost is compared with.

Each linear layer sorts its scores in every forward, makes a mask of floats of them, multiplies, and
saves what it multiplied. The scores are learned by the optimizer that learns the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopV(torch.autograd.Function):
    """Eq. 1 of Sanh et al. 2020 by a sort; straight-through in the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, density: float) -> Tensor:
        """1 for the greatest scores, 0 for the others, float32 of their shape."""
        mask = torch.zeros_like(scores)
        order = scores.flatten().sort(descending=True, stable=True).indices
        mask.view(-1)[order[: round(density * scores.numel())]] = 1.0
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """The gradient of the mask is that of the scores."""
        return grads[0], None


class NaiveLinear(nn.Linear):
    """A linear layer whose weight is masked anew in every forward.

    Args:
        layer: whose weight and bias are taken.
        density: fraction of weights kept.
        block: rows and columns that one score governs.
    """

    def __init__(self, layer: nn.Linear, density: float, block: tuple[int, int]) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.density, self.block = density, block
        rows, cols = layer.out_features // block[0], layer.in_features // block[1]
        start = torch.rand(rows, cols, device=layer.weight.device)
        self.scores = nn.Parameter(start)

    def forward(self, input: Tensor) -> Tensor:
        mask: Any = TopV.apply(self.scores, self.density)
        for dim, size in enumerate(self.block):
            if size > 1:
                mask = mask.repeat_interleave(size, dim)
        return F.linear(input, self.weight * mask, self.bias)


def prune_naively(model: nn.Module, density: float, block: tuple[int, int] = (1, 1)) -> nn.Module:
    """Put a `NaiveLinear` in the place of each linear layer of the encoder, in place."""
    layers = [
        (module, name, child)
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and ".layer." in f"{path}."
    ]
    for module, name, layer in layers:
        setattr(module, name, NaiveLinear(layer, density, block))
    return model
