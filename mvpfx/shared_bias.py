"""Attention that gets the biases of all heads from elsewhere, and has fewer heads itself.

Layers of T5 or MPNet share one table of position biases, `[1, H, S, T]` once it is looked up: each
takes of it the heads that it has left, and hands on the whole.
"""

from __future__ import annotations

import functools
import inspect
import re
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvpfx.swap import original_class

ARGUMENT = "position_bias"
"""What such an attention calls the biases."""
KEPT = "kept_heads"
"""The buffer with the numbers of the heads that are left."""
HEADS = -3
"""The dimension of heads in biases."""
COUNTS = re.compile(r"(.*_)?(heads?|nh|groups)")
"""What attributes are called that hold a number of heads."""
_SUFFIX = "WithSharedBias"
_whole: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("whole", default=None)
"""The biases of all heads that a layer computed itself, and those that it kept."""


def takes_shared_bias(module: nn.Module | None) -> bool:
    """Whether a module is called with biases of heads."""
    if module is None:
        return False
    kind = original_class(module)
    return not is_shared(kind) and ARGUMENT in inspect.signature(kind.forward).parameters


def is_shared(kind: type) -> bool:
    """Whether a class is one that `shared_bias_class` made."""
    return hasattr(kind, "_mvpfx_biased")


def class_name(name: str) -> str:
    """What the class made of the one called `name` is called."""
    return name + _SUFFIX


@functools.cache
def shared_bias_class(base: type[nn.Module]) -> type[nn.Module]:
    """A class that does what `base` does, with some of the heads that biases come for."""
    own_forward = base.forward
    signature = inspect.signature(own_forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get(ARGUMENT)
        pair = None
        if isinstance(given, Tensor):
            pair = given, _chosen(self, given)
            bound.arguments[ARGUMENT] = pair[1]
        token = _whole.set(None)
        try:
            result = own_forward(*bound.args, **bound.kwargs)
            pair = pair or _whole.get()
        finally:
            _whole.reset(token)
        if pair is None or not isinstance(result, tuple):
            return result
        items = cast("tuple[Any, ...]", result)
        return tuple(pair[0] if item is pair[1] else item for item in items)

    forward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    body: dict[str, Any] = {
        "forward": forward,
        "_mvpfx_biased": base,
        "__module__": base.__module__,
        "__reduce_ex__": _reduce,
    }
    if hasattr(base, "compute_bias"):
        body["compute_bias"] = _compute_bias
    return type(class_name(base.__name__), (base,), body)


def _compute_bias(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    base: Any = cast("Any", self)._mvpfx_biased
    whole: Tensor = base.compute_bias(self, *args, **kwargs)
    chosen = _chosen(self, whole)
    _whole.set((whole, chosen))
    return chosen


def _chosen(module: nn.Module, biases: Tensor) -> Tensor:
    kept: Tensor = getattr(module, KEPT)
    return biases.index_select(HEADS, kept)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _rebuild, (cast("Any", self)._mvpfx_biased,), cast("Any", self).__getstate__()


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = shared_bias_class(base)
    return kind.__new__(kind)


def all_heads(count: int) -> Tensor:
    """The numbers of all heads."""
    return torch.arange(count)


def most_heads(module: nn.Module) -> int:
    """The largest number that a module holds under the name of a number of heads; 0 if none."""
    held = [v for n, v in vars(module).items() if type(v) is int and COUNTS.fullmatch(n)]
    return max(held, default=0)
