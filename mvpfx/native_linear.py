"""A dense linear layer that native kernels compute beside sparse ones."""

from __future__ import annotations

from torch import Tensor, nn

from mvpfx.kernels.changes import LooksAgain


class NativeLinear(LooksAgain, nn.Linear):
    """`nn.Linear`, computed in the chains of the sparse layers around it.

    Between two sparse layers a dense product on torch's kernels costs more than itself: tiles leave
    before it and enter after it. Outside of chains, that is with gradients, under autocast, or
    where something traces the model, it is an `nn.Linear`.
    """

    output_layout = "tiled"  # as a sparse layer on native kernels has it

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """Hold copies of `weight` `[N, K]` and `bias` `[N]`."""
        rows, columns = weight.shape
        layer = cls.empty(columns, rows, bias is not None)
        layer.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: bool) -> NativeLinear:
        """A layer of a size, whose tensors are yet to be put in."""
        return cls(in_features, out_features, bias, device="meta")

    @property
    def storage_bytes(self) -> int:
        """Bytes of the weight, without the bias."""
        return self.weight.numel() * self.weight.element_size()
