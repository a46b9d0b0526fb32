"""What is patched while a region is recorded, and what the recorded forward must not change."""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch import nn
from torch.utils import checkpoint

from mvpfx.held_values import WRITTEN, content, own_values, same, walk
from mvpfx.leaves import autograd_leaf, is_leaf_type
from mvpfx.outside import Outside
from mvpfx.recording import CaptureError
from mvpfx.torch_private import CHECKPOINT_GENERATOR, in_backward
from mvpfx.transformers_types import AttentionIsLeaf

if TYPE_CHECKING:
    from mvpfx.recorder import Recorder

_TABLES = tuple(
    name
    for name, value in nn.Module().__dict__.items()
    if isinstance(value, dict) and name != "_modules"
)
"""Attributes of every module that a forward may write to, as transformers adds hooks."""

one_at_a_time = threading.RLock()
"""Held by the thread that records: what it looks at must not be what another one has patched."""
_thread = threading.local()


def is_capturing() -> bool:
    """Whether this thread is recording; parameters then read raw, without their mask."""
    return bool(getattr(_thread, "depth", 0))


class Capturing:
    """While entered, this thread's reads of a masked parameter give the raw one."""

    def __enter__(self) -> None:
        _thread.depth = getattr(_thread, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        _thread.depth -= 1


class Running:
    """While entered, this thread is inside the forward of a prepared module."""

    def __enter__(self) -> None:
        _thread.running = getattr(_thread, "running", 0) + 1
        if _thread.running == 1:
            _thread.forward = next(_forwards)

    def __exit__(self, *error: object) -> None:
        _thread.running -= 1


_forwards = itertools.count(1)


def forward_number() -> int | None:
    """The number of the outermost forward of a prepared module that this thread runs, unlike that
    of any other forward; None outside.
    """
    return _thread.forward if getattr(_thread, "running", 0) else None


def is_running() -> bool:
    """Whether this thread computes: in a prepared module's forward, or in a backward pass, where
    checkpointed code runs again.
    """
    return bool(getattr(_thread, "running", 0)) or in_backward()


class Interception:
    """While entered, calls of modules, attention and `autograd.Function` go to the recorder.

    The patches are global, so recordings take turns; other threads see the originals.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        with ExitStack() as stack:  # what fails half-way is undone as far as it went
            stack.enter_context(one_at_a_time)
            stack.enter_context(Capturing())
            self._enter(stack)
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _enter(self, stack: ExitStack) -> None:
        recorder, owner = self.recorder, threading.get_ident()
        recording = [True]  # a function that another thread took may be called when it is over
        stack.callback(recording.clear)

        def mine() -> bool:
            return bool(recording) and threading.get_ident() == owner and not recorder.paused

        call_module = nn.Module.__call__

        def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = recorder.writer.module_names.get(id(module))
            if not mine() or name is None:
                return call_module(module, *args, **kwargs)
            recorder.writer.path.append(name)
            try:
                if is_leaf_type(type(module)):
                    return recorder.leaf_module(module, args, kwargs)
                return call_module(module, *args, **kwargs)
            finally:
                recorder.writer.path.pop()

        base_apply = inspect.getattr_static(torch.autograd.Function, "apply")

        def function_apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not mine():
                return base_apply.__get__(None, function)(*args, **kwargs)
            if issubclass(function, checkpoint.CheckpointFunction):
                raise CaptureError("activation checkpointing inside the region")
            return recorder.leaf(autograd_leaf(function), args, kwargs)

        run_checkpoint = getattr(checkpoint, CHECKPOINT_GENERATOR)

        def no_checkpoint(*args: Any, **kwargs: Any) -> Any:
            if mine():
                raise CaptureError("activation checkpointing inside the region")
            return run_checkpoint(*args, **kwargs)

        _patch(stack, nn.Module, "__call__", module_call)
        _patch(stack, torch.autograd.Function, "apply", classmethod(function_apply))
        _patch(stack, checkpoint, CHECKPOINT_GENERATOR, no_checkpoint)

        def leaf_call(leaf: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return recorder.leaf(leaf, args, kwargs) if mine() else leaf(*args, **kwargs)

        stack.enter_context(AttentionIsLeaf(leaf_call))


def _patch(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute of a class or module until `stack` is closed."""
    own = name in vars(owner)
    original = vars(owner).get(name)
    stack.callback(lambda: setattr(owner, name, original) if own else delattr(owner, name))
    setattr(owner, name, value)


class SideEffects:
    """A snapshot of the Python state a recorded forward could change."""

    def __init__(self, module: nn.Module, outside: Outside) -> None:
        self.outside = outside
        self.random_state = random.getstate()
        self.numpy_state: Any = numpy.random.get_state()
        self.entries = [
            (type(part).__name__, dictionary, dict(dictionary))
            for part in module.modules()
            for dictionary in (part.__dict__, *_tables(part))
        ]
        self.buffers = [(b, b._version, b.clone()) for b in module.buffers() if b.dim() == 0]
        seen: set[int] = set()
        self.containers = [
            (f"{type(part).__name__}.{key}", container, _copy(container))
            for part in module.modules()
            for key, value in own_values(part)
            for container in walk(value, seen)
            if isinstance(container, _WRITABLE)
        ]
        self.containers += [
            (name, container, _copy(container))
            for name, container in outside.containers()
            if isinstance(container, _WRITABLE)
        ]

    def restore(self) -> list[str]:
        """Undo what changed; the names of what did."""
        changed = self.outside.restore()
        for buffer, version, before in self.buffers:
            if buffer._version != version:  # counters take part for real; the graph counts too
                with torch.no_grad():
                    buffer.copy_(before)
        if random.getstate() != self.random_state:
            random.setstate(self.random_state)
            changed.append("Python's random generator")
        if not _same_draws(numpy.random.get_state(), self.numpy_state):
            numpy.random.set_state(self.numpy_state)
            changed.append("NumPy's random generator")
        for kind, dictionary, before in self.entries:
            for key in set(dictionary) | set(before):
                if dictionary.get(key) is before.get(key) and (key in dictionary) == (
                    key in before
                ):
                    continue
                changed.append(f"{kind}.{key}")
                if key in before:
                    dictionary[key] = before[key]
                else:
                    del dictionary[key]
        for name, container, before in self.containers:
            if _differs(container, before):
                changed.append(name)
                _refill(container, before)
        return changed


def _tables(part: nn.Module) -> Iterator[dict[Any, Any]]:
    """What makes a module one, but for its inner modules: parameters, buffers and all its hooks."""
    for name in _TABLES:
        table = part.__dict__.get(name)
        if isinstance(table, dict):
            yield cast("dict[Any, Any]", table)


_WRITABLE = (list, dict, set, deque, numpy.ndarray)


def _copy(container: Any) -> Any:
    """What a container holds; a dictionary past methods that would make its values."""
    return dict(dict.items(container)) if isinstance(container, dict) else container.copy()


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, numpy.ndarray):
        container[...] = before
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(before)


def _same_draws(one: Any, other: Any) -> bool:
    """Whether two states of NumPy's generator are the same."""
    return one[2:] == other[2:] and bool((one[1] == other[1]).all())


def _differs(container: Any, before: Any) -> bool:
    if isinstance(container, numpy.ndarray):
        return not same(content(container), content(before))
    if isinstance(container, dict):
        held = _copy(container)
        return any(
            k not in before or k not in held or held[k] is not before[k]
            for k in (held.keys() | before.keys()) - WRITTEN
        )
    if len(container) != len(before):
        return True
    if isinstance(container, set):
        return container != before
    return any(a is not b for a, b in zip(container, before, strict=True))
