"""HeldProduct: a masked weight that is kept between forwards without gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvpfx.distributed import is_sharded, version
from mvpfx.torch_private import is_fake, transforms_active


class _Made(NamedTuple):
    source: object
    key: Hashable
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
        self, weight: Tensor, source: object, key: Hashable, make: Callable[[], Tensor]
    ) -> Tensor:
        """The masked weight now. Only that of a whole parameter is held, and none that is traced,
        transformed, or of inference mode, where nobody counts what is written.

        Args:
            weight: the parameter.
            source: what the result depends on beside it, the same object until it changes.
            key: what else, to be compared.
            make: computes the result.
        """
        whole = isinstance(weight, nn.Parameter) and not is_sharded(weight)
        if not whole or torch.compiler.is_compiling() or is_fake(weight) or transforms_active():
            return make()
        if weight.is_inference():
            return make()
        key, made = (*version(weight), key), self._made
        valid = made is not None and made.source is source and made.key == key
        if made is None or not valid or made.product._version != made.version:
            with torch.no_grad(), torch.inference_mode(False):
                product = make()
            self._made = made = _Made(source, key, product, product._version)
        return made.product

    def release(self) -> None:
        """Make the masked weight anew at the next use."""
        self._made = None
