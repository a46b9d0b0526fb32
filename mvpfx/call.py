"""The arguments of a region's call, kept so that the call can be made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvpfx.torch_private import pytree
from mvpfx.transformers_types import is_cache, is_cache_layer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclass(frozen=True)
class _Blank:
    """What is kept of a tensor where its numbers do not matter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments, with copies of the caches that the call is about to fill."""
    return _mapped((args, kwargs), _with_own_cache)


def blank(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments without the numbers in them: next to no memory, for as long as need be."""
    return _mapped((args, kwargs), _without_numbers)


def filled(call: Arguments) -> Arguments:
    """Arguments to call with: zeros for tensors of which no numbers were kept."""

    def fill(value: Any) -> Any:
        if isinstance(value, _Blank):
            return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        return _with_own_cache(value)

    return _mapped(call, fill)


def _with_own_cache(value: Any) -> Any:
    return copy.deepcopy(value) if is_cache(value) else value


def _without_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Blank(tuple(value.shape), value.dtype, value.device)
    if not is_cache(value):
        return value
    return copy.deepcopy(value, {id(t): t.to("meta") for t in _tensors(value, set())})


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a cache and its parts hold."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        parts: Any = value if isinstance(value, (list, tuple, dict)) else vars(value)
        for part in parts.values() if isinstance(parts, dict) else parts:
            plain = isinstance(part, (Tensor, list, tuple, dict))
            if plain or is_cache(part) or is_cache_layer(part):
                yield from _tensors(part, seen)


def _mapped(call: Arguments, change: Callable[[Any], Any]) -> Arguments:
    flat, spec = pytree.tree_flatten(call, is_leaf=is_cache)
    return pytree.tree_unflatten([change(value) for value in flat], spec)
