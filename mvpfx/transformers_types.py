"""What is known of Hugging Face transformers; nothing here imports it before the user does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mvpfx.leaves import attention_leaf

LeafCall = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers `PreTrainedModel`."""
    kind = _loaded("transformers.modeling_utils", "PreTrainedModel")
    return kind is not None and isinstance(model, kind)


def is_cache(value: object) -> bool:
    """Whether `value` is a transformers key/value cache."""
    kind = _loaded("transformers.cache_utils", "Cache")
    return kind is not None and isinstance(value, kind)


def is_cache_layer(value: object) -> bool:
    """Whether `value` is what one layer of a cache holds."""
    names = ("CacheLayerMixin", "LinearAttentionCacheLayerMixin")
    kinds = [_loaded("transformers.cache_utils", name) for name in names]
    return any(kind is not None and isinstance(value, kind) for kind in kinds)


def layer_type(cache: Any, layer: int) -> type | None:
    """The class of one layer of a cache, which may be made at its first update; None if unknown."""
    if layer < len(cache.layers):
        return type(cache.layers[layer])
    return getattr(cache, "layer_class_to_replicate", None)


def grows(kind: type | None) -> bool:
    """Whether an update of such a layer returns what it held, then what is new."""
    names = ("DynamicLayer", "DynamicSlidingWindowLayer")
    known = [_loaded("transformers.cache_utils", name) for name in names]
    return kind is not None and kind in known


def held_length(cache: Any, layer: int) -> int:
    """How many tokens a layer that grows holds; -1 where it keeps more than it returns."""
    if layer >= len(cache.layers):
        return 0
    held = cache.layers[layer]
    if getattr(held, "record_past", False):
        return -1
    return int(held.keys.shape[-2]) if held.is_initialized and held.keys.numel() else 0


def collected_outputs() -> tuple[str, ...]:
    """What transformers' own hooks collect at the moment, such as "attentions"."""
    active = _loaded("transformers.utils.output_capturing", "_active_collector")
    collected = active.get() if active is not None else None
    return tuple(collected) if collected else ()


def is_idle_hook(hook: Any) -> bool:
    """Whether a forward hook is one of transformers' own that collects nothing at the moment."""
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return False
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False))
    return "key" in cells and cells["key"].cell_contents not in collected_outputs()


def is_checkpointed_block(module: nn.Module) -> bool:
    """Whether `module` is a repeated block of a transformers model."""
    kind = _loaded("transformers.modeling_layers", "GradientCheckpointingLayer")
    return kind is not None and isinstance(module, kind)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a transformers `Conv1D`: a linear layer whose weight is `[in, out]`."""
    kind = _loaded("transformers.pytorch_utils", "Conv1D")
    return kind is not None and isinstance(module, kind)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a mixture as stacked weights `[experts, .., ..]`."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or not type(module).__module__.startswith("transformers."):
        return False
    weights = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    return bool(weights) and all(weight.shape[0] == count for weight in weights)


def is_router(module: nn.Module) -> bool:
    """Whether `module` scores the experts of a mixture: a matrix with a row for each of them."""
    count = getattr(module, "num_experts", None)
    weight = module._parameters.get("weight")
    own = type(module).__module__.startswith("transformers.")
    return own and weight is not None and weight.dim() == 2 and weight.shape[0] == count


def base_model_name(model: nn.Module) -> str:
    """The name of the base model inside a task model; "" where it is the model itself."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix and prefix in dict(model.named_children()) else ""


class AttentionIsLeaf:
    """While entered, attention functions looked up by a model are recorded as leaves."""

    def __init__(self, call: LeafCall) -> None:
        self.call = call
        self.interface = _loaded("transformers.modeling_utils", "AttentionInterface")

    def __enter__(self) -> None:
        if self.interface is None:
            return
        self.original = original = self.interface.get_interface
        call = self.call

        def get_interface(interface: Any, name: str, default: Any) -> Callable[..., Any]:
            leaf = attention_leaf(original(interface, name, default))

            def recorded(*args: Any, **kwargs: Any) -> Any:
                return call(leaf, args, kwargs)

            return recorded

        self.interface.get_interface = get_interface

    def __exit__(self, *error: object) -> None:
        if self.interface is not None:
            self.interface.get_interface = self.original
