"""Recurrent layers, whose forward reads a list of weights that is kept beside the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

FLAT = "_flat_weights"


def recurrent_weights(module: nn.Module) -> Iterator[str]:
    """Names of the matrices of a recurrent layer or cell; none for any other module.

    >>> list(recurrent_weights(nn.LSTM(4, 8)))
    ['weight_ih_l0', 'weight_hh_l0']
    """
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        for name, parameter in module._parameters.items():
            if name.startswith("weight") and parameter is not None:
                yield name


def flat_weights_property() -> property:
    """The list as attributes read at the moment: masked while a forward runs, else raw."""

    def get(self: nn.Module) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in cast("Any", self)._flat_weights_names]

    def put(self: nn.Module, weights: list[Tensor | None]) -> None:
        self.__dict__[FLAT] = weights

    return property(get, put)


def refresh_flat_weights(model: nn.Module) -> None:
    """Let recurrent layers read the parameters they hold now, after these were replaced."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            names: list[str] = cast("Any", module)._flat_weights_names
            module.__dict__[FLAT] = [getattr(module, name, None) for name in names]
