"""Elementwise nodes: which they are, and what they make of a constant channel.

A node is elementwise where each output value depends on the input values at the same place only.
The table is closed: a callable that is not in it is not elementwise, however innocent it looks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_UNARY = (
    "abs", "atan", "ceil", "celu", "clamp", "clamp_max", "clamp_min", "cos", "elu", "erf",
    "exp", "expm1", "floor", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "log1p", "logsigmoid", "mish", "nan_to_num", "neg", "pow", "relu", "relu6",
    "round", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin", "softplus", "softshrink",
    "softsign", "sqrt", "square", "tanh", "tanhshrink", "threshold",
)  # fmt: skip
_BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "truediv": operator.truediv,
    "iadd": operator.add,
    "imul": operator.mul,
    "multiply": operator.mul,
    "subtract": operator.sub,
}


def _subtracted(x: Any, y: Any) -> Any:
    return y - x


def _divided(x: Any, y: Any) -> Any:
    return y / x


_REFLECTED = {
    "__radd__": operator.add,
    "__rmul__": operator.mul,
    "__rsub__": _subtracted,
    "rsub": _subtracted,
    "__rtruediv__": _divided,
    "__rdiv__": _divided,
}
_IDENTITY = (
    "contiguous",
    "clone",
    "detach",
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type_as",
)
_DROPOUT = (
    "alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "feature_dropout",
)  # fmt: skip
_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_MODULES = (
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.RReLU,
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip

Operation = Callable[..., Any]


def find_operation(node: fx.Node, module: nn.Module | None = None) -> Operation | None:
    """Return what an elementwise node computes in eval mode, out of place; None for any other.

    Args:
        node: any node.
        module: what a call_module node calls.
    """
    if not node.args:  # its operands come by name, which nobody here looks for
        return None
    if node.op == "call_module":
        return _module_operation(module)
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return None
    if name in _DROPOUT and node.op == "call_function":
        always = _argument(node, 2, "training") is True
        return None if always else _first
    if name in _IDENTITY:
        return _first
    if name in _REFLECTED:
        return None if node.kwargs else _REFLECTED[name]
    bare = name.removeprefix("__").removesuffix("__").removesuffix("_")
    if bare in _BINARY:
        return None if set(node.kwargs) - {"other"} else _BINARY[bare]
    if bare in _UNARY:
        return _unary(bare, node.target if callable(node.target) else None)
    return None


def evaluate(operation: Operation, node: fx.Node, values: Sequence[Any]) -> Tensor:
    """Apply an operation to values (float64 `[C]` or numbers) of a node's positional arguments."""
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "other")}
    extra = [node.kwargs["other"]] if "other" in node.kwargs else []
    result: Tensor = operation(*values, *extra, **kwargs)
    return result


def _function_name(target: object) -> str:
    name = str(getattr(target, "__name__", ""))
    homes = (torch, F, torch.Tensor, operator)
    return name if any(getattr(home, name, None) is target for home in homes if name) else ""


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _first(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _unary(name: str, target: Operation | None) -> Operation:
    named = getattr(torch, name, None) or getattr(F, name)
    function: Operation = named if target is None or name == "pow" else target

    def out_of_place(x: Any, *args: Any, **kwargs: Any) -> Any:
        # In-place forms write into the clone.
        return function(x.clone() if isinstance(x, Tensor) else x, *args, **kwargs)

    return out_of_place


def _module_operation(module: nn.Module | None) -> Operation | None:
    if isinstance(module, _DROPOUTS):
        return _first
    if module is None or type(module) not in _MODULES:
        return None
    layer: nn.Module = module

    def call(x: Tensor) -> Any:
        return layer(x.clone())

    return call
