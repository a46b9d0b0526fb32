"""Which rule a node follows. The table is closed: what is not in it is opaque."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from mvpfx.dims.attention import Attention, CacheUpdate
from mvpfx.dims.choice import HeadChoice, is_head_choice
from mvpfx.dims.contraction import Contraction
from mvpfx.dims.convolution import Convolution, Lookup
from mvpfx.dims.elementwise import Comparison, Elementwise, PerChannel
from mvpfx.dims.find_slicewise import find_slicewise
from mvpfx.dims.grouped_convolution import GroupedConvolution
from mvpfx.dims.indexing import find_indexed
from mvpfx.dims.operations import find_operation
from mvpfx.dims.rearrangement import EXPANSIONS, NAMES, SHAPED, Expansion, Rearrangement
from mvpfx.dims.rule import Opaque, Rule, Step
from mvpfx.dims.stack import find_stack

_MOVING = (nn.ChannelShuffle, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unflatten)
"""Layers that only move elements."""
_COMPARISONS = frozenset((
    "and", "eq", "ge", "gt", "invert", "le", "logical_and", "logical_not", "logical_or", "lt",
    "masked_fill", "maximum", "minimum", "ne", "or", "where",
))  # fmt: skip
LARGEST = 2**28
"""Elements of the largest rearrangement that is looked into."""
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def find_rule(step: Step, can_fold: bool) -> Rule:
    """The rule of a step.

    Args:
        step: with its values.
        can_fold: whether constants can be added to the bias of this matmul.
    """
    opaque = Opaque(f"{step.name} is not known to keep dimensions apart")
    if not step.outputs or not step.inputs:
        return opaque
    if step.node.op == "call_module":
        return _of_module(step) or opaque
    if getattr(step.node.target, "role", None) == "attention":
        return _attention(step, 2) or opaque
    if step.name == "scaled_dot_product_attention":
        return _attention(step, 1) or opaque
    if step.name == "update" and _is_cache_update(step):
        return CacheUpdate()
    found = (
        (HeadChoice() if is_head_choice(step) else None)
        or find_stack(step)
        or find_indexed(step)
        or _product(step, can_fold)
        or _convolution(step, can_fold)
        or find_slicewise(step)
    )
    if found is not None:
        return found
    if step.name in NAMES and moves_only(step):
        return Expansion() if step.name in EXPANSIONS else Rearrangement()
    larger = step.name in ("max", "min") and len(step.values) == 2
    if (step.name.strip("_") in _COMPARISONS or larger) and len(step.outputs) == 1:
        return Comparison()
    operation = find_operation(step.node)
    if operation is not None and len(step.outputs) == 1 and is_floating(step):
        return Elementwise(operation)
    if step.name == "embedding" and len(step.inputs) == 2:
        return Lookup()
    return opaque


def moves_only(step: Step) -> bool:
    """Whether all tensors a node reads are moved, and none of them says where to."""
    first = step.node.args[0] if step.node.args else None
    moved = first if isinstance(first, (tuple, list)) else (first,)
    if step.name in SHAPED and len(step.inputs) == 2:
        moved = step.node.args[:2]
    whole = sum(math.prod(value.shape) for value in (*step.outputs, *step.inputs))
    return set(step.values) <= set(moved) and whole < LARGEST


def is_floating(step: Step) -> bool:
    """Whether a node makes real numbers."""
    value = step.node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _of_module(step: Step) -> Rule | None:
    module = step.module
    operation = find_operation(step.node, module)
    if operation is not None:
        return Elementwise(operation)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        return PerChannel(module.eps) if module.track_running_stats else None
    if isinstance(module, nn.Embedding) and module.max_norm is None and "weight" in step.extra:
        return Lookup()
    if isinstance(module, _MOVING):
        return Rearrangement() if moves_only(step) else None
    return find_slicewise(step)


def _is_cache_update(step: Step) -> bool:
    """Whether keys and values go into a cache and come out of it."""
    shapes = [value.shape for value in (*step.inputs, *step.outputs)]
    plain = len(step.inputs) == len(step.outputs) == 2 and all(len(s) == 4 for s in shapes)
    return plain and len({(s[1], s[3]) for s in shapes}) == 1


def _nonzero(padding: Any) -> bool:
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _attention(step: Step, out_heads: int) -> Rule | None:
    given = list(step.values.values())
    if len(given) < 3 or any(len(v.shape) != 4 for v in given[:3]):
        return None
    query, key, value = given[:3]
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        return None
    return Attention(out_heads)


def _product(step: Step, can_fold: bool) -> Rule | None:
    """Linear layers, matmul and their relatives, einsum of two operands."""
    given = list(step.values.values())
    shapes = [len(v.shape) for v in given]
    plain = not set(step.node.kwargs) - {"bias", "other", "mat2"}
    if step.name == "linear" and len(given) in (2, 3) and shapes[1] == 2:
        front = "abcdefgh"[: shapes[0] - 1]
        bias = 2 if len(given) == 3 else None
        return Contraction(f"{front}k", "nk", f"{front}n", (0, 1, bias), can_fold)
    if step.name == "addmm" and plain and shapes == [1, 2, 2]:
        return Contraction("mk", "kn", "mn", (1, 2, 0), can_fold)
    if step.name in ("matmul", "__matmul__", "mm", "bmm") and plain and len(given) == 2:
        return _matmul(given[0].shape, given[1].shape, (0, 1))
    if step.name == "einsum" and len(given) == 2:
        return _einsum(step)
    return None


def _matmul(x: tuple[int, ...], y: tuple[int, ...], order: tuple[int, int]) -> Rule | None:
    if len(x) < 2 or len(y) < 2:
        return None
    batch = "abcdefgh"[: max(len(x), len(y)) - 2]
    left, right = batch[len(batch) - len(x) + 2 :], batch[len(batch) - len(y) + 2 :]
    return Contraction(f"{left}mk", f"{right}kn", f"{batch}mn", (*order, None))


def _einsum(step: Step) -> Rule | None:
    equation = str(step.node.args[0]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    x, _, y = inputs.partition(",")
    if not arrow or "." in equation or any(len(set(w)) != len(w) for w in (x, y, out)):
        return None
    alone = {c for c in x + y if c not in out and not (c in x and c in y)}
    return None if alone else Contraction(x, y, out, (0, 1, None))


def _convolution(step: Step, can_fold: bool) -> Rule | None:
    transposed = step.name in _TRANSPOSED
    if step.name not in _CONVOLUTIONS and not transposed:
        return None
    given = list(step.values.values())
    if len(given) < 2 or not given[1].known.is_all:
        return None
    x, weight = given[0], given[1]
    if len(x.shape) != len(weight.shape):
        return None
    groups = step.argument(6, "groups", 1)
    if not isinstance(groups, int):
        return None
    padding = step.argument(4, "padding", 0)
    padded = transposed or (padding not in (0, "valid") and _nonzero(padding))
    if groups > 1:
        return GroupedConvolution(transposed, padded, can_fold, groups)
    return Convolution(transposed, padded, can_fold)
