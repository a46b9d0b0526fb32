"""Calls that are recorded as one node instead of being looked into.

A leaf names the callable, the role it plays for the passes, and its fake rule: what comes out, in
shape and dtype, when it is met with fake tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvpfx.native_linear import NativeLinear
from mvpfx.storage import SparseLinear
from mvpfx.torch_private import grouped_mm, linear

FakeRule = Callable[..., Any]


class Leaf:
    """A callable that is one node in a graph.

    Attributes:
        function: what runs.
        name: its name, for people.
        role: "attention" for (module, q, k, v, mask, ...) -> (out [B, S, H, D], weights or None),
            "autograd" for the `apply` of an `autograd.Function`.
        fake: the fake rule; `function` itself where it is None.
    """

    def __init__(self, function: Callable[..., Any], role: str, fake: FakeRule | None = None):
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self.role = role
        self.fake = fake or function
        self.__name__ = self.name
        self.__qualname__ = self.name
        self.__module__ = "mvpfx.leaves"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Leaf({self.role} {self.name})"


_attention: dict[Callable[..., Any], Leaf] = {}
_autograd: dict[type, Leaf] = {}


def attention_leaf(function: Callable[..., Any]) -> Leaf:
    """The leaf of one attention function; the same object each time it is asked for."""
    if function not in _attention:
        name = getattr(function, "__name__", "")
        known = name in ("sdpa_attention_forward", "eager_attention_forward")
        _attention[function] = Leaf(function, "attention", _fake_attention(name) if known else None)
    return _attention[function]


def _fake_attention(name: str) -> FakeRule:
    def fake(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, length, _width = query.shape
        out = query.new_empty((batch, length, heads, value.shape[-1]))
        weights = None
        if name == "eager_attention_forward":
            weights = query.new_empty((batch, heads, length, key.shape[2]))
        if any(tensor.requires_grad for tensor in (query, key, value)):
            tie = 0 * (query.sum() + key.sum() + value.sum())
            out = out + tie
            weights = weights + tie if weights is not None else None
        return out, weights

    return fake


def autograd_leaf(function: type[torch.autograd.Function]) -> Leaf:
    """The leaf of an `autograd.Function`: looked into, its backward would be lost."""
    if function not in _autograd:

        def apply(*args: Any, **kwargs: Any) -> Any:
            return function.apply(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

        apply.__name__ = f"{function.__name__}_apply"
        _autograd[function] = Leaf(apply, "autograd")
    return _autograd[function]


def _fake_grouped_mm(first: Tensor, second: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    tie = (0 * (first.sum() + second.sum())).to(first.dtype)
    return tie.expand(first.shape[0], second.shape[-1]) * 1.0


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_autocast_enabled(input.device.type) or input.dtype != weight.dtype:
        return linear(input, weight, bias)
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return linear(input, weight, bias)
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    sources = (input, weight) if bias is None else (input, weight, bias)
    return _with_gradient(out, *sources)


def _with_gradient(out: Tensor, *sources: Tensor) -> Tensor:
    """`out` as autograd would hand it on: no leaf, and requiring gradients if a source does."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return out.requires_grad_().clone()
    return out


FAKE_RULES: dict[Callable[..., Any], FakeRule] = {
    grouped_mm: _fake_grouped_mm,
    linear: _fake_linear,
}
"""Functions recorded as they are, whose own fake kernel is slower or stricter than need be."""

_SAME_SHAPE = (nn.LayerNorm, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def fake_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a leaf module returns for fakes; its own forward where there is no shorter way."""
    input: Any = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(input, Tensor):  # pyright: ignore[reportPrivateUsage]
        # Its forward would count the batch, for real.
        return _with_gradient(torch.empty_like(input), input, *module.parameters(recurse=False))
    plain = isinstance(module, _SAME_SHAPE) and isinstance(input, Tensor)
    if isinstance(module, nn.LayerNorm) and plain:
        size = module.normalized_shape
        plain = len(size) == 1 and input.dim() > 0 and input.shape[-1] == size[0]
        plain &= all(p.dtype == input.dtype for p in module.parameters(recurse=False))
    if not plain or torch.is_autocast_enabled(input.device.type) or not input.is_contiguous():
        return cast("Any", type(module)).forward(module, *args, **kwargs)
    return _with_gradient(torch.empty_like(input), input, *module.parameters(recurse=False))


_LOOKED_INTO = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,  # pyright: ignore[reportPrivateUsage]
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)


@functools.cache
def is_leaf_type(kind: type) -> bool:
    """Whether modules of this class are one node: torch.nn layers that multiply by no weight, and
    layers on native kernels or with sparse weights.

    >>> is_leaf_type(nn.LayerNorm), is_leaf_type(nn.Linear)
    (True, False)
    """
    if issubclass(kind, (SparseLinear, NativeLinear)):
        return True
    own = kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module
    return own and not issubclass(kind, _LOOKED_INTO)
