"""Totals: what a whole model holds and computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.flops import count_flops
from mvpfx.mask import Mask


@dataclass(frozen=True)
class Totals:
    """A whole model in numbers; scores and masks do not count.

    Attributes:
        parameters: stored values of all parameters, each once.
        nonzero: those that are not zero.
        tensor_bytes: of parameters and buffers, indices of sparse weights included.
        flops: of one call with the example inputs; None where there were none.
    """

    parameters: int
    nonzero: int
    tensor_bytes: int
    flops: int | None = None


def measure_totals(model: nn.Module, example_inputs: Any = None) -> Totals:
    """Count what `model` holds and, with example inputs, computes.

    Raises:
        ValueError: the inputs do not fit.
    """
    parameters = dict(_held(model, "_parameters"))
    buffers = dict(_held(model, "_buffers"))
    both = (parameters | buffers).values()
    return Totals(
        parameters=sum(value.numel() for value in parameters.values()),
        nonzero=sum(int(torch.count_nonzero(value)) for value in parameters.values()),
        tensor_bytes=sum(value.numel() * value.element_size() for value in both),
        flops=None if example_inputs is None else count_flops(model, example_inputs).total,
    )


def _held(model: nn.Module, kind: str) -> Iterator[tuple[int, Tensor]]:
    """Every tensor once, by its identity."""
    for module in model.modules():
        if not isinstance(module, Mask):
            for value in getattr(module, kind).values():
                if value is not None:
                    yield id(value), value
