"""FLOPs: floating-point operations of the matmuls of one call, counted while it runs.

A multiplication and an addition are two. Matmuls, convolutions and attention count, as in
`torch.utils.flop_counter`, whose formulas are used; of a sparse matrix its stored values do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry

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
    meter = _Meter(names, _Running(model))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operator, whatever it computes
    try:
        with inference(model), operators.as_operator, meter.modules, meter:
            run_example(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Flops(meter.total, dict(meter.by_parameter), dict(meter.by_module))


class _Running:
    """While entered, knows which modules of a model run their forward.

    torch's `ModuleTracker` follows the backward pass as well, with hooks on tensors that views of
    parameters made without gradients refuse.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self._known = {id(module): name for name, module in model.named_modules()}
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for handle in (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ):
            self._hooks.callback(handle.remove)

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._known:
            self.names.append(self._known[id(module)])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._known:
            self.names.pop()


class _Meter(TorchDispatchMode):
    """Adds up FLOPs of operators, for the parameters they read and the modules they run in."""

    def __init__(self, names: Mapping[int, str], modules: _Running) -> None:
        super().__init__()
        self.names = names
        self.modules = modules
        self.total = 0
        self.by_parameter: dict[str, int] = defaultdict(int)
        self.by_module: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _flops_of(func.overloadpacket, args, kwargs or {}, out)
        if count:
            self.total += count
            for name in set(self.modules.names):
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


def _sparse(crow: Tensor, col: Tensor, values: Tensor, bias: Any, x_t: Tensor, *_: Any) -> int:
    return 2 * values.numel() * x_t.shape[1]


def _tiled(crow: Tensor, col: Tensor, values: Tensor, bias: Any, x: Tensor, *_: Any) -> int:
    return 2 * values.numel() * x.shape[0]


_OWN: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._grouped_mm: _grouped,
    torch.ops.mvpfx.sparse_linear: _sparse,
    torch.ops.mvpfx.tiled_linear: _tiled,
}
"""What torch's registry does not count."""
