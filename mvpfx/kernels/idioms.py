"""What models write out in several operations, and tiles do in one: norms, rotations, activations.

Each is known by its last operation; those before it are looked at backwards, and are computed only
where something else needs them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mvpfx.nodes import name_of

PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
SUMS = ("add", "__add__", "__radd__")
CONVERSIONS = (("float", 0), ("type_as", 1))
"""Methods that convert to another dtype beside `to`, and how many arguments they have."""


@dataclass(frozen=True)
class RmsNorm:
    """`(weight + shift) * x / sqrt(mean(x^2) + epsilon)`, over the features of a token."""

    x: fx.Node
    weight: fx.Node
    epsilon: float
    shift: float = 0.0


@dataclass(frozen=True)
class Rotation:
    """`x * cosine + (-x2, x1) * sine` for `x` `[B, H, S, D]` with halves `x1` and `x2`.

    Attributes:
        cosine, sine: `[B or 1, S, D]`.
    """

    x: fx.Node
    cosine: fx.Node
    sine: fx.Node


@dataclass(frozen=True)
class Gate:
    """`x` times a function of it: an activation.

    Attributes:
        activation: `gelu_tanh`, `silu` or `gelu_quick`, as `mvpfx.kernels.prepared_chain` has them.
    """

    x: fx.Node
    activation: str


_SIGMOIDS = {1.0: "silu", 1.702: "gelu_quick"}
"""What `x * sigmoid(c * x)` is called, by `c`."""


def find_rms_norm(node: fx.Node) -> RmsNorm | None:
    """The norm whose last operation is this product, or the conversion of what it gives."""
    for factor, normed in _operands(_cast(node), PRODUCTS):
        weight, shift = _shifted(factor)
        for x, inverse in _operands(_cast(normed), PRODUCTS):
            epsilon = _inverse_root(inverse, x)
            if epsilon is not None and weight.op == "get_attr":
                return RmsNorm(_as_in(node, x), weight, epsilon, shift)
    return None


def _shifted(node: fx.Node) -> tuple[fx.Node, float]:
    """What a node is the sum of with a number, and that number; else itself and 0."""
    term, number = _with_number(node, SUMS)
    return (_cast(node), 0.0) if term is None else (_cast(term), number)


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """What a node is the product of with a number, and that number; else itself and 1."""
    term, number = _with_number(node, PRODUCTS)
    return (node, 1.0) if term is None else (term, number)


def _with_number(node: fx.Node, names: tuple[str, ...]) -> tuple[fx.Node | None, float]:
    if _call(node) in names and len(node.args) == 2 and not node.kwargs:
        for term, number in (node.args, node.args[::-1]):
            if isinstance(term, fx.Node) and isinstance(number, (int, float)):
                return term, float(number)
    return None, 0.0


def find_gate(node: fx.Node) -> Gate | None:
    """The activation whose last operation is this product: of `x`, perhaps times a number, and a
    function of `x` that goes from 0 to 1 or to 2.
    """
    for straight, opening in _operands(node, PRODUCTS):
        x, factor = _scaled(straight)
        inside = _only(opening, "sigmoid")
        if inside is not None and factor == 1.0:
            gated, steepness = _scaled(inside)
            name = _SIGMOIDS.get(steepness)
            if gated is x and name is not None:
                return Gate(x, name)
        upper, one = _shifted(opening)
        inside = _only(upper, "tanh")
        if inside is not None and (factor, one) == (0.5, 1.0) and _bends(inside, x):
            return Gate(x, "gelu_tanh")
    return None


def _bends(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is `sqrt(2 / pi) * (x + 0.044715 * x^3)`."""
    inside, root = _scaled(node)
    for straight, bent in _operands(inside, SUMS):
        cube, share = _scaled(bent)
        if straight is x and _is_power(cube, x, 3) and share == 0.044715:
            return math.isclose(root, math.sqrt(2 / math.pi), rel_tol=1e-7)
    return False


def _inverse_root(node: fx.Node, x: fx.Node) -> float | None:
    """The epsilon of `rsqrt(mean(x^2, -1) + epsilon)`; None for anything else."""
    inside = _only(node, "rsqrt")
    if inside is None or _call(inside) not in SUMS or len(inside.args) != 2 or inside.kwargs:
        return None
    mean, epsilon = inside.args
    if not isinstance(mean, fx.Node) or not isinstance(epsilon, float):
        return None
    dimension = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    last = dimension == -1 or (isinstance(dimension, (list, tuple)) and list(dimension) == [-1])
    if _call(mean) != "mean" or not last or mean.kwargs.get("keepdim") is not True:
        return None
    square = mean.args[0] if mean.args else None
    return epsilon if isinstance(square, fx.Node) and _is_power(square, x, 2) else None


def _is_power(node: fx.Node, x: fx.Node, exponent: int) -> bool:
    return _call(node) == "pow" and node.args == (x, exponent) and not node.kwargs


def find_rotation(node: fx.Node) -> Rotation | None:
    """The rotation whose last operation is this sum, or the conversion of what it gives."""
    for straight, crossed in _operands(_cast(node), SUMS):
        for x, cosine in _operands(straight, PRODUCTS):
            for swapped, sine in _operands(crossed, PRODUCTS):
                tables = [t for t in (_of_all_heads(cosine), _of_all_heads(sine)) if t]
                if len(tables) == 2 and _swaps_halves(swapped, _cast(x)):
                    return Rotation(_as_in(node, x), *tables)
    return None


def _swaps_halves(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is `cat((-x2, x1))` of the halves of `x` along the last dimension."""
    value = x.meta.get("val")
    width = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    dimension = node.kwargs.get("dim", (*node.args, None, None)[1])
    if _call(node) != "cat" or dimension != -1 or type(width) is not int or width % 2:
        return False
    parts = node.args[0] if node.args else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return False
    second, first = parts
    upper = _only(second, "neg") if isinstance(second, fx.Node) else None
    half = width // 2
    return _is_slice(upper, x, slice(half, None)) and _is_slice(first, x, slice(None, half))


def _is_slice(node: Any, x: fx.Node, wanted: slice) -> bool:
    indexes = isinstance(node, fx.Node) and _call(node) in ("getitem", "__getitem__")
    if not isinstance(node, fx.Node) or not indexes or len(node.args) != 2:
        return False
    source, index = node.args
    return isinstance(source, fx.Node) and _cast(source) is x and index == (..., wanted)


def _of_all_heads(node: fx.Node) -> fx.Node | None:
    """The table `[B, S, D]` that a node is one for all heads of, `[B, 1, S, D]`."""
    if _call(node) != "unsqueeze" or node.args[1:] != (1,) or node.kwargs:
        return None
    table = node.args[0]
    value = table.meta.get("val") if isinstance(table, fx.Node) else None
    return table if isinstance(table, fx.Node) and value is not None and value.dim() == 3 else None


def _call(node: fx.Node) -> str:
    """What a node calls; empty for a module, whose name says nothing."""
    return name_of(node) if node.op.startswith("call") and node.op != "call_module" else ""


def _operands(node: fx.Node, names: tuple[str, ...]) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a sum or a product, in both orders; none for anything else."""
    if _call(node) not in names or len(node.args) != 2 or node.kwargs:
        return []
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return []
    return [(left, right), (right, left)]


def _only(node: fx.Node, name: str) -> fx.Node | None:
    """What a call of this name with one argument is given."""
    if _call(node) != name or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _cast(node: fx.Node) -> fx.Node:
    """What a node is a conversion of, to another dtype or to its own; else itself."""
    while (source := _converted(node)) is not None:
        node = source
    return node


def _as_in(result: fx.Node, node: fx.Node) -> fx.Node:
    """What a node is a conversion of, as far back as that has the dtype of a result."""
    wanted = _dtype(result)
    while (source := _converted(node)) is not None:
        if _dtype(node) is wanted is not _dtype(source):
            break
        node = source
    return node


def _converted(node: fx.Node) -> fx.Node | None:
    """What a conversion converts; None for other nodes."""
    source, other = (node.args[0], node.args[1:]) if node.args else (None, ())
    to_dtype = _call(node) == "to" and len(other) == 1 and str(other[0]).startswith("torch.")
    known = to_dtype or (_call(node), len(other)) in CONVERSIONS
    return source if known and not node.kwargs and isinstance(source, fx.Node) else None


def _dtype(node: fx.Node) -> object:
    return getattr(node.meta.get("val"), "dtype", None)
