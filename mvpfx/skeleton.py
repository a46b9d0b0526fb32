"""Models of transformers without numbers, built from what a file says, within the file's bounds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mvpfx.blueprint import Blueprint
from mvpfx.bounded_build import bounded
from mvpfx.file_limits import FileLimits, check_implementation, plain_config


def make_skeleton(blueprint: Blueprint, limits: FileLimits) -> nn.Module:
    """A transformers model of the class and configuration of a blueprint, without numbers.

    Args:
        blueprint: from a file.
        limits: of that file.

    Raises:
        ValueError: there is no such class, it does not take the configuration, or it takes more
            than the file's tensors can fill.
    """
    if blueprint.config is None:
        raise ValueError(
            f"{blueprint.kind} is no transformers model, and code is not loaded from files. Pass "
            f"load a {blueprint.kind} as it was before it was pruned, model=..."
        )
    transformers = importlib.import_module("transformers")
    kind = transformers_class(blueprint.kind)
    check_implementation("attention", blueprint.attention)
    model = build_empty(kind, blueprint.config, limits)
    try:
        with bounded(limits):
            if blueprint.attention is not None:
                model.set_attn_implementation(blueprint.attention)
            if blueprint.generation is not None:
                settings = transformers.GenerationConfig.from_dict(blueprint.generation)
                model.generation_config = settings
    except Exception as error:
        raise ValueError(f"{blueprint.kind} does not take its settings: {error}") from error
    return model


def build_empty(kind: Any, config: Mapping[str, Any], limits: FileLimits) -> Any:
    """A model of a class of transformers, without numbers.

    Raises:
        ValueError: the class does not take the configuration, or takes more than its limits.
    """
    plain = plain_config(config, limits.number)
    try:
        with bounded(limits), torch.device("meta"):
            model = kind(kind.config_class.from_dict(plain))
        for key, value in config.items():  # as it was, where it is no longer read
            if key not in plain or (type(value) is int and type(plain[key]) is float):
                setattr(model.config, key, value)
    except Exception as error:
        raise ValueError(f"{kind.__name__} does not take its configuration: {error}") from error
    return model


def transformers_class(name: str) -> Any:
    """The model class of transformers that is called `name`.

    Raises:
        ValueError: there is none.
    """
    transformers = importlib.import_module("transformers")
    kind: Any = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has no model {name}")
    return kind
