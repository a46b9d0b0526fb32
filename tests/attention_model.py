"""A model around `nn.MultiheadAttention`, some of whose heads can be made dead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from tests.graphs import zero_

WIDTH, HEAD = 32, 8


class Model(nn.Module):
    """An attention, called as a test wants, and a layer after it."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, 4, **options)
        self.last = nn.Linear(WIDTH, 4)
        self.call = call or {}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Tensor) -> Tensor:
        out, weights = self.attention(query, key, value, **self.call, **masks)
        if weights is not None and self.call.get("need_weights"):
            return self.last(out) + weights.sum() + weights.flatten()[0]
        return self.last(out)


class Unmasked(Model):
    """The same, which no caller can give a mask: every query attends to all keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(query, key, value)


def head(index: int) -> slice:
    return slice(index * HEAD, (index + 1) * HEAD)


def kill(attention: nn.MultiheadAttention, unread: int = 1, constant: int | None = 2) -> None:
    """Zero the columns that read one head, and the rows that make another one's values."""
    zero_(attention.out_proj.weight[:, head(unread)])
    if constant is not None:
        packed = attention._parameters["in_proj_weight"]
        values = attention.v_proj_weight if packed is None else packed[2 * WIDTH :]
        zero_(values[head(constant)])


def inputs(model: Model, masks: str = "") -> dict[str, Tensor]:
    """Queries, keys and values, and masks: p(adding), a(ttention), or both, or c(ausal)."""
    attention, sizes = model.attention, (2, 5, 6)
    batch, queries, keys = sizes if "c" not in masks else (2, 5, 5)
    made = {
        "query": torch.randn(batch, queries, WIDTH),
        "key": torch.randn(batch, keys, attention.kdim),
        "value": torch.randn(batch, keys, attention.vdim),
    }
    if not attention.batch_first:
        made = {name: value.transpose(0, 1).contiguous() for name, value in made.items()}
    if "p" in masks:
        made["key_padding_mask"] = torch.zeros(batch, keys).masked_fill(
            torch.arange(keys) > 3, -torch.inf
        )
    if "a" in masks:
        made["attn_mask"] = torch.randn(queries, keys)
    if "c" in masks:
        made["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(keys)
    return made


def as_double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in batch.items()}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)


def converted(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return mvpfx.convert(model.eval(), example_inputs=batch, lowering="dense")
