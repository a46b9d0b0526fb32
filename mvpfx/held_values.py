"""Values that modules hold beside tensors: numbers, names, switches, in containers and configs."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

_CODE = (FunctionType, BuiltinFunctionType)
PLAIN = frozenset((bool, int, float, complex, str, type(None), torch.dtype, torch.device, *_CODE))

WRITTEN = frozenset(("problem_type",))
"""Config entries that task heads write at their first call, and blocks do not read."""

DEEPEST = 4
LONGEST = 256
"""Containers with more entries, and what lies deeper, hold data: no forward branches on them."""

_OWN = frozenset(nn.Module().__dict__) - {"training"}
_LIBRARIES = ("torch", "mvpfx", "accelerate")
"""Objects of these keep state of their own beside the model."""

Container = dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any]


def own_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself holds in attributes, without what makes it a module."""
    for name, value in module.__dict__.items():
        if name not in _OWN and not name.startswith("_mvpfx"):
            yield name, value


def walk(value: Any, seen: set[int], depth: int = 0) -> Iterator[Any]:
    """The plain values under `value` in order, and each container they are in before its content.

    An object that is neither a module, a tensor nor code counts as the dictionary of its
    attributes.

    Args:
        value: where to start.
        seen: ids of the containers met; each is walked once.
        depth: how many containers `value` lies in.
    """
    if type(value) in PLAIN or isinstance(value, enum.Enum):
        yield value
        return
    container = _container(value)
    if container is None or depth == DEEPEST or len(container) > LONGEST:
        return
    if not isinstance(container, tuple):
        if id(container) in seen:
            return
        seen.add(id(container))
    yield container
    if isinstance(container, dict):
        for key, inner in container.items():
            if key not in WRITTEN:
                yield key if type(key) in PLAIN else type(key)
                yield from walk(inner, seen, depth + 1)
    else:
        for inner in container:
            yield from walk(inner, seen, depth + 1)


def is_container(value: Any) -> bool:
    """Whether `walk` gave a container, and no plain value."""
    return isinstance(value, (dict, list, tuple, set, frozenset))


def _container(value: Any) -> Container | None:
    if is_container(value):
        return cast("Container", value)
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value):
        return None
    if type(value).__module__.partition(".")[0] in _LIBRARIES:
        return None
    return getattr(value, "__dict__", None)
