"""FLOPs: floating-point operations of the matmuls of one call, counted while it runs.

A multiplication and an addition are two. Matmuls, convolutions and attention count, as in
`torch.utils.flop_counter`, whose formulas are used; of a sparse matrix its stored values do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from mvpfx.example import inference, run_example
from mvpfx.kernels import operators
from mvpfx.torch_private import TorchDispatchMode

_SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call of a model.

    Attributes:
        total: of all matmuls.
        by_parameter: parameter name -> those of the matmuls that read it, or a part of it.
        by_module: module name -> those inside its forward.
    """

    total: int
    by_parameter: Mapping[str, int]
    by_module: Mapping[str, int]


def count_flops(model: nn.Module, example_inputs: Any) -> Flops:
    """FLOPs of a call of `model` in eval mode.

    Raises:
        ValueError: the inputs do not fit.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(parameter.untyped_storage().data_ptr(), name)
    meter = _Meter(names)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operator, whatever it computes
    try:
        with inference(model), operators.as_operator, meter.modules, meter:
            run_example(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    root = type(model).__name__
    inside = {name.removeprefix(f"{root}."): count for name, count in meter.by_module.items()}
    return Flops(meter.total, dict(meter.by_parameter), inside)


class _Meter(TorchDispatchMode):
    """Adds up FLOPs of operators, for the parameters they read and the modules they run in."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.modules = ModuleTracker()
        self.total = 0
        self.by_parameter: dict[str, int] = defaultdict(int)
        self.by_module: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _flops_of(func.overloadpacket, args, kwargs or {}, out)
        if count:
            self.total += count
            for name in self.modules.parents:
                self.by_module[name] += count
            read = {self._name(arg) for arg in args if isinstance(arg, Tensor)}
            for name in filter(None, read):
                self.by_parameter[name] += count
        return out

    def _name(self, tensor: Tensor) -> str | None:
        if tensor.layout is not torch.strided:
            return None
        return self.names.get(tensor.untyped_storage().data_ptr())


def _flops_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    sparse = [arg for arg in args if isinstance(arg, Tensor) and arg.layout in _SPARSE]
    if sparse:
        if not isinstance(out, Tensor) or len(args) < 2:
            return 0
        return 2 * sparse[0].values().numel() * (out.numel() // sparse[0].shape[0])
    own = _OWN.get(packet)
    if own is not None:
        return own(*args)
    known: Any = flop_registry.get(packet)
    return 0 if known is None else int(known(*args, **kwargs, out_val=out))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """`[B, H, S, D]`, `[B, H, T, D]` and `[B, H, T, E]`."""
    return 2 * math.prod(query.shape[:3]) * key.shape[2] * (query.shape[3] + value.shape[3])


def _grouped(x: Tensor, weights: Tensor, *_: Any) -> int:
    """Rows `[T, K]`, each with one of the weights `[E, K, N]`."""
    return 2 * x.shape[0] * weights.shape[-2] * weights.shape[-1]


def _tiled(crow: Tensor, col: Tensor, values: Tensor, bias: Any, x: Tensor, *_: Any) -> int:
    return 2 * values.numel() * x.shape[0]


_OWN: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._grouped_mm: _grouped,
    torch.ops.mvpfx.tiled_linear: _tiled,
}
"""What torch's registry does not count."""
