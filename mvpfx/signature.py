"""Signatures: which calls of a region may run as the same graph."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.held_values import content, is_container, own_values, same, walk
from mvpfx.mask import Mask
from mvpfx.recording import CONSTANTS, CaptureError
from mvpfx.torch_private import (
    autocast_state,
    has_global_hooks,
    is_fake,
    pytree,
    transforms_active,
)
from mvpfx.transformers_types import collected_outputs, is_cache

_LEAVES = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of a call's arguments in the order of torch's pytree, and how they were nested.

    Leaves and tuples of leaves, which is all that most blocks are called with, need no tree.

    >>> flatten((1, (2.0, "a")), {"scale": None})[0]
    [1, 2.0, 'a', None]
    """
    flat: list[Any] = []
    tuples: list[tuple[int, int]] = []
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind in _LEAVES or is_cache(value):
            flat.append(value)
        elif kind is tuple and all(type(leaf) in _LEAVES for leaf in value):
            tuples.append((len(flat), len(value)))
            flat.extend(value)
        else:
            return pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
    return flat, (len(args), tuple(kwargs), tuple(tuples))


def signature(
    module: nn.Module, flat: list[Any], spec: Any, configuration: Configuration
) -> tuple[Any, ...]:
    """What a captured graph depends on besides sizes; calls of equal signatures share graphs.

    Args:
        module: the region that is called.
        flat: its arguments, flattened.
        spec: how they were nested.
        configuration: remembers the configuration of `module`.

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
            if value.layout is not torch.strided or value.is_nested:
                kind = "nested tensor" if value.is_nested else str(value.layout)
                raise CaptureError(f"an argument is a {kind}, not an ordinary tensor")
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
        configuration.number(module),
        tuple(leaves),
    )


class Configuration:
    """All that the forward of one region may branch on besides its arguments.

    That is the modules there are, with the plain values they hold in attributes, containers and
    configs. Leaves count too, although they are called live: BERT hands the rate of a dropout layer
    to its attention function. What was looked at is remembered: while each container holds what it
    held, which is quick to tell, the answer stays what it was.
    """

    def __init__(self) -> None:
        self._current = -1
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._parts: list[nn.Module] = []
        self._types: list[type] = []
        self._dictionaries: list[dict[str, Any]] = []
        self._copies: list[dict[str, Any]] = []
        self._containers: list[Any] = []
        self._contents: list[tuple[Any, ...]] = []
        self._parameters: list[nn.Parameter] = []
        self._dtypes: list[torch.dtype] = []
        self._hooks: list[Any] = []
        self._counts: list[int] = []

    def number(self, module: nn.Module) -> int:
        """A number that stands for all of it: equal when everything is what it was.

        Args:
            module: the region, always the same one.
        """
        if self._current < 0 or not self._holds():
            self._look(module)
        return self._current

    def modules(self, module: nn.Module) -> list[nn.Module]:
        """The modules that there are, without masks."""
        self.number(module)
        return self._parts

    def _holds(self) -> bool:
        try:
            return (
                list(map(len, self._hooks)) == self._counts
                and list(map(type, self._parts)) == self._types
                and all(map(eq, self._dictionaries, self._copies))
                and all(map(same, map(content, self._containers), self._contents))
                and [p.dtype for p in self._parameters] == self._dtypes
            )
        except (RuntimeError, TypeError, ValueError):  # a tensor was replaced: == is no bool
            return False

    def _look(self, module: nn.Module) -> None:
        key: list[Any] = []
        parts: list[nn.Module] = []
        containers: list[Any] = []
        seen: set[int] = set()
        stack = [module]
        while stack:
            part = stack.pop()
            parts.append(part)
            key.append(type(part))
            for name, value in own_values(part):
                if isinstance(value, Iterator):
                    raise CaptureError(f"{type(part).__name__}.{name} is an iterator: it moves on")
                key.append(name)
                for found in walk(value, seen):
                    inside = is_container(found)
                    key.append(type(found) if inside else found)
                    if inside and type(found) not in (tuple, frozenset):  # these never change
                        containers.append(found)
            for child in part._modules.values():
                key.append(id(child))
                if child is not None and not isinstance(child, Mask):
                    key.extend(len(hooks) for hooks in _hooks_of(child))
                    stack.append(child)
        key.extend(parameter.dtype for parameter in module.parameters())
        self._current = self._numbers.setdefault(tuple(key), len(self._numbers))
        self._parts, self._types = parts, list(map(type, parts))
        self._hooks = [hooks for part in parts[1:] for hooks in _hooks_of(part)]
        self._counts = list(map(len, self._hooks))
        inner = [part._modules for part in parts if part._modules]
        held = [held for held in containers if isinstance(held, dict) and not _has_tensors(held)]
        whole = set(map(id, held))
        self._containers = [held for held in containers if id(held) not in whole]
        self._contents = list(map(content, self._containers))
        self._parameters = list(module.parameters())
        self._dtypes = [p.dtype for p in self._parameters]
        self._dictionaries = [*(part.__dict__ for part in parts), *inner, *held]
        self._copies = list(map(dict, self._dictionaries))


def _has_tensors(held: Any) -> bool:
    """Whether a dictionary holds tensors: == of two of them says nothing of which they are."""
    return any(isinstance(value, Tensor) for value in held.values())


_hooks_of = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
