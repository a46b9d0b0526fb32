"""Parameter groups: what the optimizer may do to weights, and what to scores."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from mvpfx.checks import as_number
from mvpfx.mask import Mask
from mvpfx.state import mark_optimizer_built


def parameter_groups(
    model: nn.Module, lr: float, score_lr: float = 1e-2, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: weights, biases and norms, scores.

    Scores have their own learning rate and no weight decay, which would pull them all to zero.
    Biases and the parameters of normalisation layers have no decay either, as is usual. Each
    parameter that requires a gradient is in one group, once, under however many names it goes.

    Args:
        model: a prepared model.
        lr: learning rate of everything but scores.
        score_lr: learning rate of the scores; 1e-2 in Sanh et al. 2020.
        weight_decay: of weights.

    Returns:
        Up to three groups, each with `name` (weights, no_decay, scores), `params`, `lr` and
        `weight_decay`.

    Raises:
        TypeError: if a rate is no number.
        ValueError: if one is negative or not finite.
    """
    rates = {"lr": lr, "score_lr": score_lr, "weight_decay": weight_decay}
    for name, value in rates.items():
        if as_number(value, name) < 0:
            raise ValueError(f"{name} must be at least 0; found {value!r}.")
    if score_lr == 0 and any(isinstance(part, Mask) and part.rated() for part in model.modules()):
        warnings.warn(
            "score_lr=0 never moves the scores, so masks would not learn. Give them a learning "
            "rate, such as score_lr=1e-2.",
            stacklevel=2,
        )
    groups: dict[str, dict[str, Any]] = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
        "scores": {"lr": score_lr, "weight_decay": 0.0},
    }
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in module.rated() if isinstance(module, Mask) else own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[_group_of(module, parameter)].append(parameter)
    mark_optimizer_built(model)
    return [
        {"name": name, "params": parameters[name], **options}
        for name, options in groups.items()
        if parameters[name]
    ]


def _group_of(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, Mask):
        return "scores"
    is_norm = "norm" in type(module).__name__.lower()
    return "no_decay" if is_norm or parameter.dim() < 2 else "weights"
