"""A converted model as a plain one again, to be prepared and pruned further."""

from __future__ import annotations

import torch
from torch import nn

from mvpfx.native_linear import NativeLinear
from mvpfx.state import detach_state
from mvpfx.storage import SparseLinear
from mvpfx.swap import restore


def is_converted(model: nn.Module) -> bool:
    """Whether any layer of a model is stored or computed as `convert` leaves it."""
    return any(isinstance(part, (SparseLinear, NativeLinear)) for part in model.modules())


def make_plain(model: nn.Module) -> None:
    """Turn sparse and native layers into `nn.Linear`, in place, and let all parameters train.

    What was removed stays removed. Zeros of sparse storages become weights that are zero.

    Raises:
        ValueError: the model is such a layer itself, and cannot be replaced in place.
    """
    if isinstance(model, (SparseLinear, NativeLinear)):
        raise ValueError(
            f"the model is a {type(model).__name__}, which cannot become an nn.Linear in place. "
            "Put it into a module, such as nn.Sequential(layer), before preparing it."
        )
    detach_state(model)
    restore(model)
    plain: dict[int, nn.Linear] = {}  # a layer that is used in two places stays one
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, (SparseLinear, NativeLinear)):
                plain.setdefault(id(child), _linear(child))
                module._modules[name] = plain[id(child)]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _linear(layer: SparseLinear | NativeLinear) -> nn.Linear:
    weight = layer.dense() if isinstance(layer, SparseLinear) else layer.weight
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, layer.bias is not None, device="meta")
    with torch.inference_mode(False), torch.no_grad():
        made.weight = nn.Parameter(weight.detach().clone())
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.train(layer.training)
