"""Signatures: which calls of a region may run as the same graph."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.mask import Mask
from mvpfx.recording import CONSTANTS, CaptureError
from mvpfx.torch_private import autocast_state, has_global_hooks, is_fake, transforms_active
from mvpfx.transformers_types import collected_outputs, is_cache

_CODE = (FunctionType, BuiltinFunctionType)
_PLAIN = frozenset((bool, int, float, complex, str, type(None), torch.dtype, torch.device, *_CODE))

_WRITTEN = frozenset(("problem_type",))
"""Config entries that task heads write at their first call, and blocks do not read."""


def signature(module: nn.Module, flat: list[Any], spec: Any) -> tuple[Any, ...]:
    """What a captured graph depends on besides sizes; calls of equal signatures share graphs.

    Args:
        module: the region that is called.
        flat: its arguments, flattened.
        spec: how they were nested.

    Raises:
        CaptureError: no graph can stand for the call.
    """
    if has_global_hooks():
        raise CaptureError("hooks are registered on all modules")
    if transforms_active():
        raise CaptureError("a transform of torch.func is under way")
    if "_is_replica" in module.__dict__:
        raise CaptureError("it is a replica of nn.DataParallel")
    leaves: list[Any] = []
    devices = {"cpu"}
    for value in flat:
        if isinstance(value, Tensor):
            if is_fake(value) or type(value) not in (Tensor, nn.Parameter):
                raise CaptureError(f"an argument is a {type(value).__name__}")
            devices.add(value.device.type)
            small = tuple(min(size, 2) for size in value.shape)  # 0 and 1 are no symbols
            leaves.append(
                (value.dtype, value.device, small, value.requires_grad, value.is_contiguous())
            )
        elif is_cache(value):
            leaves.append(type(value))
        elif isinstance(value, CONSTANTS):
            leaves.append((type(value), value))
        else:
            raise CaptureError(f"an argument of type {type(value).__name__} is not known")
    return (
        spec,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_state(tuple(sorted(devices))),
        collected_outputs(),
        _configuration(module),
        tuple(leaves),
    )


def _configuration(module: nn.Module) -> tuple[Any, ...]:
    """All that a forward may branch on besides its arguments: the modules there are, their plain
    attributes, and those of their configs. Leaves count too, although they are called live: BERT
    hands the rate of a dropout layer to its attention function.
    """
    values: list[Any] = []
    configs: list[Any] = []
    stack = [module]
    while stack:
        part = stack.pop()
        attributes = part.__dict__
        values.append(type(part))
        for value in attributes.values():
            kind = type(value)
            if kind in _PLAIN:
                values.append(value)
            elif kind is tuple or kind is list:
                values.append(tuple(v for v in value if type(v) in _PLAIN))
        config = attributes.get("config")
        if config is not None and not any(config is seen for seen in configs):
            configs.append(config)
        for child in part._modules.values():
            values.append(id(child))
            if child is None or isinstance(child, Mask):
                continue
            values.append(len(child._forward_hooks) + len(child._forward_pre_hooks))
            values.append(len(child._backward_hooks) + len(child._backward_pre_hooks))
            stack.append(child)
    for config in configs:
        fields = getattr(config, "__dict__", {})
        values.extend(v for k, v in fields.items() if type(v) in _PLAIN and k not in _WRITTEN)
    return tuple(values)
