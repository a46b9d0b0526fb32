"""An independent count of the weights a model multiplies by, from the kernels that run.

Nothing of mvpfx takes part: below autograd and below every Python function, each kernel that
multiplies matrices is asked whose storage its factors have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo.entry import Batch

_FACTORS: dict[str, tuple[int, ...]] = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::convolution": (1,),
    "aten::_grouped_mm": (0, 1),
}
"""Which arguments of a kernel are multiplied."""

_COPIES = (
    "aten::_to_copy",
    "aten::clone",
    "aten::copy_",
    "aten::index",
    "aten::index_select",
    "aten::slice_backward",
)
"""Kernels whose result holds the values of their one operand, in another place or type."""


class Multiplied(TorchDispatchMode):
    """While entered, collects the parameters that kernels multiply by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._owner = {
            _storage(parameter): name
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2
        }
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _COPIES and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            owner = self._owner.get(_storage(args[0]))
            if owner is not None and _storage(out) not in self._owner:
                self._owner[_storage(out)] = owner
                self._alive.append(out)  # its address must not be given away
        self.names |= {
            self._owner[_storage(factor)]
            for factor in _factors(name, args)
            if _storage(factor) in self._owner
        }
        return out


def _factors(name: str, args: Any) -> Iterator[Tensor]:
    if name in _FACTORS:
        yield from (args[position] for position in _FACTORS[name])
    elif any(word in name for word in ("rnn", "lstm", "gru")):
        for arg in args[1:]:
            parts = arg if isinstance(arg, (list, tuple)) else [arg]
            yield from (part for part in parts if isinstance(part, Tensor) and part.dim() == 2)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def multiplied_parameters(model: nn.Module, batch: Batch) -> set[str]:
    """Names (the first of each) of the parameters that a training call of `model` multiplies by."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    count = Multiplied(model)
    with torch.random.fork_rng(), count:
        model(**batch)
    for module, training in modes:
        module.training = training
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return count.names
