"""Forms that tiled activations have outside, and what leads from one to another.

Views, transpositions and parts change the form alone: tiles stay where they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from mvpfx.nodes import name_of

ROWS, SPLIT, HEADS = "rows", "split", "heads"
"""`[..., S, F]`, `[B, S, H, D]` and `[B, H, S, D]`."""
PARTS, STACKED = "parts", "stacked"
"""Queries, keys and values that one matmul makes: `[B, S, P, H, D]` and `[P, B, H, S, D]`."""
OF_PARTS = {(PARTS, 2): SPLIT, (STACKED, 0): HEADS}
"""The form of one of them, by theirs and the dimension along which it is taken."""

_VIEWS = ("view", "reshape", "flatten", "unflatten")
_LAST_TWO = ({1, 2}, {-3, -2}, {1, -2}, {2, -3})
_PERMUTATIONS: dict[Any, str] = {(0, 2, 1, 3): "transpose", (2, 0, 3, 1, 4): "stack"}


def form_change(node: fx.Node, name: str) -> str | None:
    """How a node changes the form of what it reads: view, transpose or stack; None for others."""
    if name in _VIEWS:
        return "view"
    if name == "transpose":
        return name if set(node.args[1:]) in _LAST_TWO else None
    if name == "permute" and not node.kwargs:
        rest = node.args[1:]
        order = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        return _PERMUTATIONS.get(tuple(order))
    return None


def changed_form(change: str, form: str, before: Any, after: Any) -> str | None:
    """The form after a change, as `form_change` calls it, of one tensor into another; None for one
    that tiles do not have.
    """
    old, new = tuple(map(str, before.shape)), tuple(map(str, after.shape))
    if change == "transpose":
        return {SPLIT: HEADS, HEADS: SPLIT}.get(form) if len(new) == 4 else None
    if change == "stack":
        return STACKED if form == PARTS else None
    if form == ROWS and len(old) == 3 and len(new) in (4, 5) and new[:2] == old[:2]:
        return SPLIT if len(new) == 4 else PARTS
    if form == SPLIT and len(new) == 3:
        return ROWS if new[:2] == old[:2] else None
    return form if new == old else None


def find_features(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Of a part of the last dimension: what it is a part of, and its first feature."""
    source, index = _taken(node)
    if source is None:
        return None
    if isinstance(index, tuple):
        part = index[1] if len(index) == 2 and index[0] is Ellipsis else None
        if not isinstance(part, slice) or part.step not in (None, 1):
            return None
        start = part.start or 0
        return (source, start) if type(start) is int and start >= 0 else None
    known = _parted(source, ("split", "chunk"), 2)
    if known is None or type(index) is not int or index < 0:
        return None
    x, dimension = known
    value = x.meta["val"]
    start = _first(name_of(source), source.args[1:2], index, value.shape[-1])
    return (x, start) if dimension == value.dim() - 1 and start is not None else None


def find_part(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Of one of several along a dimension: what it is one of, the dimension, and which."""
    source, index = _taken(node)
    if source is None:
        return None
    known = _parted(source, ("unbind",), 1)
    if known is not None:
        return (*known, index) if type(index) is int and index >= 0 else None
    indices = index if isinstance(index, tuple) else (index,)
    which = indices[-1] if indices else None
    if type(which) is not int or which < 0 or any(i != slice(None) for i in indices[:-1]):
        return None
    return source, len(indices) - 1, which


def _taken(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """What a node takes something from, and what it takes."""
    source = node.args[0] if len(node.args) == 2 and not node.kwargs else None
    return (source, node.args[1]) if isinstance(source, fx.Node) else (None, None)


def _parted(node: fx.Node, names: tuple[str, ...], position: int) -> tuple[fx.Node, int] | None:
    """What a call takes apart, and along which dimension, its argument of that position."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in names:
        return None
    x = node.args[0] if node.args else None
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    given = node.args[position] if len(node.args) > position else 0
    dimension = node.kwargs.get("dim", given)
    if not isinstance(x, fx.Node) or not isinstance(value, Tensor) or type(dimension) is not int:
        return None
    return (x, dimension % value.dim()) if value.dim() else None


def _first(name: str, how: tuple[Any, ...], index: int, width: Any) -> int | None:
    """Where a part begins of a width that is split in parts of a size or of some, or in so many."""
    size = how[0] if how else None
    if isinstance(size, (tuple, list)):
        before = size[:index]
        return sum(before) if all(type(one) is int for one in before) else None
    if type(size) is not int or type(width) is not int:
        return None
    return index * (-(-width // size) if name == "chunk" else size)
