"""What is dead and stays: rows and columns of zeros that could not go, and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mvpfx.dims.contraction import Contraction
from mvpfx.dims.convolution import Convolution
from mvpfx.dims.flow import Flow
from mvpfx.dims.value import Value
from mvpfx.pipeline import Decision


def find_remains(flow: Flow, action: str) -> Iterator[Decision]:
    """One decision for each weight that keeps rows or columns of zeros."""
    said: set[str] = set()
    for step, rule in flow.steps:
        if not isinstance(rule, (Contraction, Convolution)):
            continue
        x, weight, _ = rule.parts(step)
        if len(weight.shape) < 2 or weight.name not in flow.parameters or weight.name in said:
            continue
        said.add(weight.name)
        rows, columns = rule.weight_dims
        texts = [
            _text(weight, dim, word, other, place)
            for dim, word, other, place in (
                (rows, "rows", step.outputs[0], step.features),
                (columns, "columns", x, rule.input_dim),
            )
        ]
        reason = "; ".join(filter(None, texts))
        if reason:
            yield Decision(weight.name, action, False, reason)


def _text(weight: Value, dim: int, word: str, other: Value, place: int) -> str:
    left = dead(weight, dim) & ~weight.removed[dim]
    if not bool(left.any()):
        return ""
    reason = weight.fixed[dim] or other.fixed[place] or other.reasons[place] or weight.reasons[dim]
    return f"{int(left.sum())} of {weight.shape[dim]} {word} are zero, but {reason}"


def dead(weight: Value, dim: int) -> Tensor:
    """Which slices of a weight along `dim` are zero wherever it stays."""
    value = weight.known.value
    stays = ~weight.elements()
    nonzero = (value != 0) & stays
    others = [d for d in range(value.dim()) if d != dim]
    return ~nonzero.any(dim=others)
