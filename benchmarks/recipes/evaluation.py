"""Scoring a model on the validation splits, in float32, masked or converted alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.recipes.task import Outputs, Validation
from benchmarks.training import to_device

MOST_APART = 0.1
"""How far, in percent, the figures of the converted model may be from those of the masked one: its
outputs agree up to rounding, which turns over a few answers of ten thousand.
"""


def evaluate(
    model: nn.Module, validations: Iterable[Validation], tokenizer: Any, batch_size: int
) -> dict[str, float]:
    """All figures of a model, in percent."""
    figures: dict[str, float] = {}
    for validation in validations:
        figures |= validation.score(predict(model, validation, tokenizer, batch_size))
    return figures


@torch.no_grad()
def predict(model: nn.Module, validation: Validation, tokenizer: Any, batch_size: int) -> Outputs:
    """What a model puts out for each feature, padding of its batch included."""
    found: Outputs = {name: [] for name in validation.outputs}
    model.eval()
    for start in range(0, len(validation.features), batch_size):
        stop = min(start + batch_size, len(validation.features))
        batch = inputs(validation.features, list(range(start, stop)), tokenizer)
        outputs: Any = model(**to_device(batch, model))
        for name, rows in found.items():
            rows.extend(outputs[name].float().cpu().numpy())
    return found


def inputs(features: Any, indices: list[int], tokenizer: Any) -> dict[str, Tensor]:
    """Features as a batch, padded to the longest of them, without labels."""
    chosen = features[indices]
    names = [name for name in tokenizer.model_input_names if name in chosen]
    return dict(tokenizer.pad({name: chosen[name] for name in names}, return_tensors="pt"))


def example_inputs(validation: Validation, tokenizer: Any) -> dict[str, Tensor]:
    """One sequence to convert on: the longest of the first."""
    lengths = [len(tokens) for tokens in validation.features[:64]["input_ids"]]
    return inputs(validation.features, [lengths.index(max(lengths))], tokenizer)


def check_same(masked: dict[str, float], converted: dict[str, float]) -> None:
    """Make sure that a converted model is as good as the masked one it came from.

    Raises:
        RuntimeError: if a figure differs.
    """
    for name, value in masked.items():
        if abs(converted[name] - value) > MOST_APART:
            raise RuntimeError(
                f"the converted model has {name} {converted[name]:.2f} and the masked one "
                f"{value:.2f}: they should agree to {MOST_APART}. Please report this; "
                "mvpfx.explain(converted) says what was done to it."
            )
