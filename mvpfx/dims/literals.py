"""Sizes written into a graph: how the arguments of a node read after a removal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.dims.channel_norm import GroupNorm
from mvpfx.dims.grouped_convolution import GroupedConvolution
from mvpfx.dims.rearrangement import Rearrangement, run, sources
from mvpfx.dims.rule import Rule, Step
from mvpfx.dims.value import Value

_SIZES = ("view", "reshape", "expand", "broadcast_to")


def new_arguments(step: Step, rule: Rule) -> tuple[Any, ...] | None:
    """The positional arguments of a step after the removal; None where there is no such call.

    A rearrangement is run with them on what stays: its result must be what stays of its result.
    """
    args = step.node.args
    if isinstance(rule, (GroupedConvolution, GroupNorm)) and step.module is None:
        place = 6 if isinstance(rule, GroupedConvolution) else 1
        kept = rule.kept_groups(step)
        if step.name == "instance_norm" or kept == rule.groups:
            return args
        return (*args[:place], kept, *args[place + 1 :]) if len(args) > place else None
    if not isinstance(rule, Rearrangement) or not is_resized(step):
        return args
    found = _rewritten(step, args)
    return found if found is not None and _agrees(step, found) else None


def is_resized(step: Step) -> bool:
    """Whether anything goes from what a step reads or makes."""
    return any(bool(along.any()) for v in (*step.inputs, *step.outputs) for along in v.removed)


def _rewritten(step: Step, args: Any) -> Any:
    name = step.name
    if name in _SIZES or (name == "unflatten" and len(args) == 3):
        return _resized(step, args)
    if name in ("split", "split_with_sizes") and len(args) > 1:
        dim = int(step.argument(2, "dim", 0)) % len(step.inputs[0].shape)
        kept = [output.kept(dim) for output in step.outputs]
        if isinstance(args[1], int):
            return (args[0], kept[0], *args[2:])
        return (args[0], kept, *args[2:]) if len(kept) == len(args[1]) else None
    if name in ("getitem", "__getitem__"):
        index: Any = args[1] if isinstance(args[1], tuple) else (args[1],)
        new_index = _index(index, step.inputs[0])
        if new_index is None:
            return None
        return (args[0], new_index if isinstance(args[1], tuple) else new_index[0])
    if name == "narrow" and all(isinstance(a, int) for a in args[1:4]):
        dim, start, length = args[1:4]
        going = step.inputs[0].removed[dim]
        return (args[0], dim, _moved(start, going), int((~going[start : start + length]).sum()))
    if name == "select" and all(isinstance(a, int) for a in args[1:3]):
        return (args[0], args[1], _moved(args[2], step.inputs[0].removed[args[1]]))
    return args


def _resized(step: Step, args: Any) -> tuple[Any, ...]:
    """A view's arguments: its sizes are those of its result."""
    front, offset = 1, 0
    if step.name == "unflatten":
        front, offset = 2, args[1] % len(step.inputs[0].shape)
    flat = len(args) > front and isinstance(args[front], (tuple, list))
    sizes: Any = args[front] if flat else args[front:]
    new = tuple(_size(size, step.outputs[0], offset + i) for i, size in enumerate(sizes))
    return (*args[:front], new) if flat else (*args[:front], *new)


def _size(size: Any, output: Value, dim: int) -> Any:
    if isinstance(size, int) and size >= 0 and dim < len(output.shape):
        return output.kept(dim)
    return size


def _index(index: tuple[Any, ...], value: Value) -> tuple[Any, ...] | None:
    """An index with its numbers counted among what stays."""
    taken = sum(1 for item in index if item is not None and item is not ...)
    new: list[Any] = []
    dim = 0
    for item in index:
        if item is None:
            new.append(item)
            continue
        if item is ...:
            new.append(item)
            dim += len(value.shape) - taken
            continue
        if isinstance(item, (list, Tensor, bool)):
            return None
        new.append(_moved_item(item, value.removed[dim]))
        dim += 1
    return tuple(new)


def _moved_item(item: Any, going: Tensor) -> Any:
    if not bool(going.any()):
        return item
    if isinstance(item, slice):
        if item.step not in (None, 1):
            return item
        return slice(_moved(item.start, going), _moved(item.stop, going), item.step)
    return _moved(item, going)


def _moved(position: Any, going: Tensor) -> Any:
    """A position along a dimension, counted among what stays; from the end where negative."""
    if not isinstance(position, int) or isinstance(position, bool):
        return position
    if position < 0:
        return -int((~going[position:]).sum()) or None
    return int((~going[:position]).sum())


def _agrees(step: Step, arguments: tuple[Any, ...]) -> bool:
    kept: dict[fx.Node, Tensor] = {}
    offset = 0
    for node, value in step.values.items():
        count = torch.Size(value.shape).numel()
        kept[node] = value.keep(torch.arange(offset, offset + count).view(value.shape))
        offset += count
    expected = [v.keep(s) for v, s in zip(step.outputs, sources(step), strict=True)]
    try:
        found = run(step, kept, arguments)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
