"""What is known of adapters and of PEFT; nothing here imports it before the user does.

An adapter stands beside a weight, in a module that took the place of the layer and holds it as
`base_layer`. The mask covers the weight, the adapter adds to what the masked weight computes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from mvpfx.mask import Mask

_BASE_LAYER = "base_layer"


def adapted_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, with its adapters; `model` itself if it is none."""
    return model.get_base_model() if _is_peft(model) else model  # pyright: ignore[reportCallIssue, reportReturnType]


def adds_to_inputs(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel` that computes more than the model in it: prompt tuning."""
    if not _is_peft(model):
        return False
    peft_model: Any = model
    return bool(peft_model.active_peft_config.is_prompt_learning)


def is_adapter(model: nn.Module, module_name: str) -> bool:
    """Whether the module of that name is a part of an adapter, or the unused copy of a layer that
    PEFT trains another copy of.
    """
    module: Any = model
    for part in module_name.split(".") if module_name else ():
        if hasattr(module, "adapter_layer_names") and part != _BASE_LAYER:
            return True
        if part == "original_module" and hasattr(module, "modules_to_save"):
            return True
        module = module._modules[part]
    return False


def without_adapters(name: str) -> str:
    """The name that a parameter has where no adapter is.

    >>> without_adapters("encoder.query.base_layer.weight")
    'encoder.query.weight'
    """
    return ".".join(part for part in name.split(".") if part != _BASE_LAYER)


def warn_of_frozen_scores(model: nn.Module, masks: Iterable[Mask]) -> None:
    """Warn where adapters were added after the masks: PEFT freezes all it did not make."""
    learned = [m.scores for m in masks if m.scores is not None and not m.accumulates]
    adapted = any(hasattr(module, "adapter_layer_names") for module in model.modules())
    if learned and adapted and not any(scores.requires_grad for scores in learned):
        warnings.warn(
            "no score requires a gradient, so the masks keep the order of their first scores: PEFT "
            "freezes what is in a model when adapters are added. Add them before mvpfx.prepare, or "
            'let scores learn: for name, p in model.named_parameters(): if name.endswith(".scores")'
            ": p.requires_grad_().",
            stacklevel=3,
        )


def _is_peft(model: nn.Module) -> bool:
    kind = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    return kind is not None and isinstance(model, kind)
