"""HeldProduct: a masked weight that is kept between forwards without gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvpfx.distributed import is_sharded
from mvpfx.torch_private import transforms_active
from mvpfx.traces import dispatch_modes_active


class _Made(NamedTuple):
    weight: Tensor
    address: int
    weight_version: int
    state: Hashable
    product: Tensor
    version: int


class HeldProduct:
    """The masked weight of one mask, made once until what it comes from changes.

    A mask lets go of it at the next forward with gradients, the next `train` or `eval`, and when
    someone outside of a forward reads the weight from its layer, who may write to it unseen.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def of(
        self, weight: Tensor, state: Callable[[], Hashable], make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The masked weight now. Only that of a whole parameter is held, and none that is
        transformed or traced, or of inference mode, where nobody counts what is written.

        Args:
            weight: the parameter.
            state: what else the result depends on: returns the same object until it changes.
            make: computes the result from the weight.
        """
        if transforms_active() or dispatch_modes_active():
            return make(weight)
        made = self._made
        if (
            made is not None
            and made.weight is weight
            and made.weight_version == weight._version
            and made.address == weight.data_ptr()
            and made.version == made.product._version
            and made.state is state()
        ):
            return made.product
        if not isinstance(weight, nn.Parameter) or is_sharded(weight) or weight.is_inference():
            return make(weight)
        with torch.no_grad(), torch.inference_mode(False):
            product = make(weight)
        address, version = weight.data_ptr(), weight._version
        self._made = _Made(weight, address, version, state(), product, product._version)
        return product

    def release(self) -> None:
        """Make the masked weight anew at the next use."""
        self._made = None
