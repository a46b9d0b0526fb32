"""Example inputs: running a model on one batch, in the mode it will be deployed in."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvpfx.swap import original_class
from mvpfx.transformers_types import is_pretrained


def run_example(model: nn.Module, example_inputs: Any) -> Any:
    """Call `model` on example inputs, whichever way they are given.

    Raises:
        ValueError: the inputs do not fit the forward.
    """
    try:
        if isinstance(example_inputs, Mapping):
            return model(**cast("Mapping[str, Any]", example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return model(*cast("tuple[Any, ...]", example_inputs))
        return model(example_inputs)
    except Exception as error:
        kind = original_class(model).__name__
        given = describe(example_inputs)
        raise ValueError(
            f"example_inputs do not fit {kind}.forward: {type(error).__name__}: {error}. "
            f"Found {given}; needed what the model is called with: "
            "a tensor, a tuple of positional arguments, or a dict of keyword arguments."
        ) from error


def own_inputs(model: nn.Module, why: str) -> Any:
    """Inputs to call a model with where nobody gave any: what a transformers model has for that.

    Args:
        model: to be called.
        why: what cannot be done without, for the message.

    Raises:
        ValueError: the model has no such inputs.
    """
    found = inputs_if_any(model)
    if found is None:
        raise ValueError(
            f"{original_class(model).__name__}: {why}, which shows when it is called. Pass one "
            "batch to mvpfx.prepare as example_inputs=."
        )
    return found


def inputs_if_any(model: nn.Module) -> Any:
    """What a transformers model has to be called with where nobody gave any; else None."""
    return _dummy_inputs(model) if is_pretrained(model) else None


def _dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """The token ids that transformers tries models with; None where this one needs other inputs."""
    device = next(model.parameters()).device
    own: dict[str, Tensor | None] = getattr(model, "dummy_inputs")  # noqa: B009  of transformers
    inputs = {name: value.to(device) for name, value in own.items() if value is not None}
    with inference(model):
        try:
            run_example(model, inputs)
        except ValueError:
            return None
    return inputs


def describe(example_inputs: Any) -> str:
    """Short text of example inputs: names and shapes."""
    if isinstance(example_inputs, Mapping):
        items = cast("Mapping[str, Any]", example_inputs).items()
        return ", ".join(f"{key}={_shape(value)}" for key, value in items) or "nothing"
    if isinstance(example_inputs, (tuple, list)):
        return ", ".join(_shape(value) for value in cast("tuple[Any, ...]", example_inputs))
    return _shape(example_inputs)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def inference(model: nn.Module) -> Generator[None]:
    """Eval mode without gradients; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
