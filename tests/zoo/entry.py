"""An entry of the zoo: a tiny model with random weights, and four batches of other shapes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]

SHAPES = ((2, 8), (1, 5), (2, 1), (3, 13))
"""(batch, sequence) of the four batches; batch 1 and sequence 1 are among them."""
VOCABULARY = 99
COMPUTED = "the matmul's weight is computed from it, by a parametrization or in the forward"
INPUT = "a table that is the input of a matmul, not its weight"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what it is called in tables.
        kind: "hf" or "torch".
        make_model: builds it; deterministic under a seed.
        make_batch: shape index -> keyword arguments of a call; one of `SHAPES`, or the nearest
            thing the model allows.
        fallback: why some of its calls run the module's own forward, as a part of the reason that
            `explain` gives; None where all are captured.
        misses: parameters that multiply something and are no site, with the reason.
    """

    name: str
    kind: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], Batch]
    fallback: str | None = None
    misses: dict[str, str] = field(default_factory=dict[str, str])

    def model(self) -> nn.Module:
        """The model; the same weights each time. Biases and norms are not what they start as."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.make_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        return model

    def batch(self, shape: int) -> Batch:
        """The batch of one shape; the same numbers each time."""
        torch.manual_seed(100 + shape)
        return self.make_batch(shape)


def output(result: Any) -> Tensor:
    """The tensor a model is used for."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple):
        return output(result[0])
    for name in ("logits", "start_logits", "logits_per_image", "last_hidden_state"):
        found = getattr(result, name, None)
        if found is not None:
            return found
    raise TypeError(f"no output is known of {type(result).__name__}")


def loss(result: Any) -> Tensor:
    """The model's own loss, else the mean square of its output."""
    own = getattr(result, "loss", None)
    if own is not None:
        return own
    out = output(result)
    return (out.abs() if out.is_complex() else out).float().pow(2).mean()


def ids(shape: int, length: int | None = None) -> Tensor:
    """Random token ids of one shape, special ones left out."""
    batch, own = SHAPES[shape]
    return torch.randint(3, VOCABULARY, (batch, length or own))


def text_batch(shape: int) -> Batch:
    """Token ids; the last row ends in padding where it is long enough."""
    batch, length = SHAPES[shape]
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1 and length > 2:
        mask[-1, -2:] = 0
    return {"input_ids": ids(shape), "attention_mask": mask}


def classified_text(shape: int) -> Batch:
    """Text with a label a row."""
    return {**text_batch(shape), "labels": classes(shape)}


def causal_text(shape: int) -> Batch:
    """Text that is its own target; a single token has no next one to predict."""
    batch = text_batch(shape)
    return {**batch, "labels": batch["input_ids"]} if SHAPES[shape][1] > 1 else batch


def translated_text(shape: int) -> Batch:
    """Text with a target of another length."""
    return {**text_batch(shape), "labels": ids(shape, (6, 4, 1, 9)[shape])}


def classes(shape: int) -> Tensor:
    """A label a row, of two classes."""
    return torch.arange(SHAPES[shape][0]) % 2
