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


def is_checkpointed_block(module: nn.Module) -> bool:
    """Whether `module` is a repeated block of a transformers model."""
    kind = _loaded("transformers.modeling_layers", "GradientCheckpointingLayer")
    return kind is not None and isinstance(module, kind)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a transformers `Conv1D`: a linear layer whose weight is `[in, out]`."""
    kind = _loaded("transformers.pytorch_utils", "Conv1D")
    return kind is not None and isinstance(module, kind)


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
