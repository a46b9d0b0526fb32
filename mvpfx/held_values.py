"""Values that modules hold besides tensors: numbers, names, switches, in containers and configs."""

from __future__ import annotations

import enum
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

_CODE = (FunctionType, BuiltinFunctionType)
PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, *_CODE)
)

WRITTEN = frozenset(("problem_type",))
"""Config entries that task heads write at their first call, and blocks do not read."""

DEEPEST = 4
LONGEST = 256
"""Containers with more entries, and what lies deeper, hold data: no forward branches on them."""

_OWN = frozenset(nn.Module().__dict__) - {"training"}
_LIBRARIES = ("torch", "mvpfx", "accelerate")
"""Objects of these keep state of their own beside the model."""

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
Container = dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any] | deque[Any]


def own_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself holds in attributes, without what makes it a module."""
    for name, value in module.__dict__.items():
        if name not in _OWN and not name.startswith("_mvpfx"):
            yield name, value


def walk(value: Any, seen: set[int], depth: int = 0) -> Iterator[Any]:
    """The plain values under `value` in order, and each container they are in before its content.

    An object that is neither a module, a tensor nor code counts as the dictionary of its
    attributes; an array of NumPy as a container of its bytes. Of a tensor in a container it is a
    weak reference that is yielded: which tensor it is, not what is in it.

    Args:
        value: where to start.
        seen: ids of the containers met; each is walked once.
        depth: how many containers `value` lies in.
    """
    if type(value) in PLAIN or isinstance(value, (enum.Enum, numpy.generic)):
        yield value
        return
    if isinstance(value, Tensor) and depth:
        yield weakref.ref(value)
    container = _container(value)
    if container is None or depth == DEEPEST or id(container) in seen:
        return
    if not isinstance(container, tuple):
        seen.add(id(container))
    if isinstance(container, _CONTAINERS) and len(container) > LONGEST:
        return
    yield container
    if isinstance(container, dict):
        for key, inner in dict.items(cast("Any", container)):  # past methods of its own
            if key not in WRITTEN:
                yield key if type(key) in PLAIN else type(key)
                yield from walk(inner, seen, depth + 1)
        return
    for inner in content(container):
        yield from walk(inner, seen, depth + 1)


def is_container(value: Any) -> bool:
    """Whether `walk` gave a container, and no plain value."""
    return isinstance(value, (*_CONTAINERS, numpy.ndarray)) or bool(_slots(value))


def content(container: Any) -> tuple[Any, ...]:
    """What a container holds now, to be compared by `same`."""
    if isinstance(container, numpy.ndarray):
        array = cast("numpy.ndarray[Any, Any]", container)
        whole = array.dtype.hasobject  # such bytes are addresses
        return (array.shape, array.dtype.str, repr(array) if whole else array.tobytes())
    if isinstance(container, dict):
        held = cast("dict[Any, Any]", container)
        return (*held, *dict.values(held))
    slots = _slots(container)
    return tuple(getattr(container, name, None) for name in slots) if slots else tuple(container)


def same(now: Iterable[Any], then: Iterable[Any]) -> bool:
    """Whether two contents are the same: tensors and other objects themselves, plain values by
    their value.
    """
    first, second = tuple(now), tuple(then)
    return len(first) == len(second) and all(map(_is_same, first, second))


def _is_same(now: Any, then: Any) -> bool:
    if now is then:
        return True
    plain = type(now) in PLAIN or isinstance(now, (tuple, bytes, numpy.generic))
    if isinstance(now, tuple):
        return isinstance(then, tuple) and same(cast("Any", now), cast("Any", then))
    return plain and type(now) is type(then) and bool(now == then)


def _container(value: Any) -> Any:
    if is_container(value):
        return value
    if isinstance(value, functools.partial):
        return (cast("Any", value).func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, (nn.Module, Tensor, type, *_CODE)):
        return None
    if type(value).__module__.partition(".")[0] in _LIBRARIES:
        return None
    return value.__dict__ if hasattr(value, "__dict__") else value if _slots(value) else None


def _slots(value: Any) -> tuple[str, ...]:
    """The attributes of an object that has no dictionary for them; none of anything else."""
    kind = type(value)
    if kind in PLAIN or kind.__module__ in _NO_SLOTS or hasattr(value, "__dict__"):
        return ()
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return tuple(
        name for names in found for name in ((names,) if isinstance(names, str) else names)
    )


_NO_SLOTS = ("builtins", "collections", "numpy", "weakref", "torch")
