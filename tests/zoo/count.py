"""An independent count of the weights a model multiplies by, from the kernels that run.

Nothing of mvpfx takes part: below autograd and below every Python function, each kernel that
multiplies matrices is asked whose storage its factors have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
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


class Multiplied(TorchDispatchMode):
    """While entered, collects the parameters that kernels multiply by.

    What is computed from parameters alone (a cast, a transposed copy, a weight norm) stands for the
    parameters it comes from.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._sources = {
            _storage(parameter): {name} if parameter.dim() >= 2 else set[str]()
            for name, parameter in model.named_parameters()
        }
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs and all(_storage(tensor) in self._sources for tensor in inputs):
            names = set[str]().union(*(self._sources[_storage(tensor)] for tensor in inputs))
            for made in pytree.tree_leaves(out):
                if isinstance(made, Tensor) and _storage(made) not in self._sources:
                    self._sources[_storage(made)] = names
                    self._alive.append(made)  # its address must not be given away
        for factor in _factors(func._schema.name, args):
            self.names |= self._sources.get(_storage(factor), set())
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
