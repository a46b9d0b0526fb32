"""Every private torch API this package relies on, in one place.

`mvpfx._supported_torch` lists them by module, and says at import which of them is missing. Nothing
else in the package imports from an underscored torch module.
"""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeArgument=false
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from sympy.core.symbol import Symbol
from torch import Tensor
from torch._C import _functorch as functorch
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as transforms_off
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as modes_off
from torch.utils._sympy import functions as symbolic
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "FakeTensor",
    "GuardOnDataDependentSymNode",
    "StorageWeakRef",
    "Symbol",
    "SymbolicShapes",
    "TorchDispatchMode",
    "expression_operator",
    "is_fake",
    "modes_off",
    "pytree",
    "set_grad_enabled",
    "sympy",
    "transforms_off",
]

_GENERATORS = (
    "_checkpoint_without_reentrant_generator_impl",  # from torch 2.14
    "_checkpoint_without_reentrant_generator",
)
CHECKPOINT_GENERATOR = next(n for n in _GENERATORS if hasattr(torch.utils.checkpoint, n))
"""What `torch.utils.checkpoint.checkpoint` calls without reentrance, in the same module."""
set_grad_enabled = torch._C._set_grad_enabled
linear = torch._C._nn.linear
grouped_mm = torch._grouped_mm
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
get_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
set_tracing_state: Callable[[Any], None] = torch._C._set_tracing_state
has_amx: Callable[[], bool] = torch.cpu._is_amx_tile_supported
has_avx512_bf16: Callable[[], bool] = torch.cpu._is_avx512_bf16_supported
canonical_mask: Callable[..., Tensor | None] = torch.nn.functional._canonical_mask
none_or_dtype: Callable[[Tensor | None], torch.dtype | None] = torch.nn.functional._none_or_dtype

_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "Pow": operator.pow,
    "ToFloat": float,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "OpaqueUnaryFn_sqrt": math.sqrt,
}
assert symbolic.FloorDiv.__name__ in _OPERATORS


def expression_operator(expression: Any) -> Callable[..., Any] | None:
    """The Python function that evaluates the head of a size expression, or None if unknown."""
    return _OPERATORS.get(type(expression).__name__)


def is_fake(value: object) -> bool:
    """Whether `value` is a fake tensor: shapes and dtypes without data."""
    return isinstance(value, FakeTensor)


def int_expression(size: Any) -> Any:
    """The sympy expression of an int or SymInt."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def float_expression(value: Any) -> Any:
    """The sympy expression behind a SymInt, SymFloat or SymBool."""
    return value.node.expr


def size_hint(size: int | torch.SymInt) -> int:
    """The number a size had in the recorded call."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def is_size_known(size: int | torch.SymInt) -> bool:
    """Whether a size had a number when the call was recorded; else only data tell it."""
    return not isinstance(size, torch.SymInt) or size.node.has_hint()


class SymbolicShapes:
    """Fake tensors whose sizes above 1 are symbols, and the guards met while they were used.

    Entered, every call of torch works on fakes. Kernels are then looked up in Python first, since
    some fake kernels written in C++ refuse symbols; and a kernel that refuses all the same is the
    recorder's to tell, not for a log.
    """

    def __init__(self) -> None:
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        # A cached answer is keyed by all symbolic sizes, and making the key takes longer than the
        # fake kernel does. It would also outlive the recording.
        self.mode.cache_enabled = False
        self._inputs = 0
        self._numbers = 0

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(enable_python_dispatcher())
            _fake_tensor_log.addFilter(_nothing)
            stack.callback(_fake_tensor_log.removeFilter, _nothing)
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fake(self, tensor: Tensor) -> FakeTensor:
        """A fake of `tensor`: one symbol for each size above 1; dtype, device, strides as given."""
        self._inputs += 1
        context = StatelessSymbolicContext(
            dynamic_sizes=[
                DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in tensor.shape
            ],
            dynamic_strides=[DimDynamic.INFER_STRIDE] * tensor.dim(),
            constraint_sizes=[None] * tensor.dim(),
            constraint_strides=[None] * tensor.dim(),
        )
        source = _source(f"input{self._inputs}")
        plain = tensor.detach()
        fake = self.mode.from_tensor(plain, symbolic_context=context, source=source)
        if not tensor.requires_grad:
            return fake
        with self.mode, torch.enable_grad():
            if tensor.is_leaf:
                return fake.requires_grad_()  # pyright: ignore[reportReturnType]
            if 0 in tensor.stride():  # values share memory, so nothing may be added in place
                return fake.requires_grad_().clone()  # pyright: ignore[reportReturnType]
            tie = torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)
            return fake.add_(tie)  # pyright: ignore[reportReturnType]

    def number(self, hint: int | None = None) -> torch.SymInt:
        """A number of 2 or more that is `hint` now; nothing is known of it where that is None."""
        self._numbers += 1
        source = _source(f"number{self._numbers}")
        hint = 1009 + self._numbers if hint is None else hint
        symbol = self.environment.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.environment.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def replaced(self, expression: Any) -> Any:
        """`expression` with what the guards made equal put in."""
        return self.environment.replace(expression)

    def guards(self) -> list[Any]:
        """The conditions on sizes under which the recorded control flow holds."""
        return [guard.expr for guard in self.environment.guards if guard.expr != sympy.true]


def _source(name: str) -> Any:
    """What torch calls the origin of a fake tensor."""
    # It brings all of torch's compiler with it, seconds that only a recording should cost.
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


_fake_tensor_log = logging.getLogger("torch._subclasses.fake_tensor")


def _nothing(record: logging.LogRecord) -> bool:
    """Lets no record through."""
    return False


def print_expression(expression: Any) -> str:
    """Python source of a size expression or guard; names of symbols are kept, `math` is needed."""
    return str(PythonPrinter().doprint(expression))


def autocast_state(device_types: tuple[str, ...]) -> tuple[Any, ...]:
    """(enabled, dtype) of autocast for each device type, to be compared."""
    state = {kind: torch.is_autocast_enabled(kind) for kind in device_types}
    return tuple((on, torch.get_autocast_dtype(kind) if on else None) for kind, on in state.items())


def has_global_hooks() -> bool:
    """Whether any hook is registered on all modules at once."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) or forward differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_proxy_mode() -> bool:
    """Whether `make_fx` writes down operations."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The (pack, unpack) that autograd would save a tensor with now; None where there is none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def may_hook_saved_tensors() -> bool:
    """Whether hooks for saved tensors are allowed here."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()


def storage_address(tensor: Tensor) -> int:
    """What is the same for tensors of one storage, and for no others while that lives."""
    return tensor.untyped_storage()._cdata


def untransformed(tensor: Tensor) -> Tensor:
    """The tensor behind what torch.func transforms wrapped around it.

    Raises:
        ValueError: it stands for a batch of tensors.
    """
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            raise ValueError(
                "vmap maps over scores, but there is one mask for all of the batch. "
                "Map over the weights alone: in_dims={..., '...scores': None}."
            )
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def in_backward() -> bool:
    """Whether this thread is in a backward pass of autograd."""
    return torch._C._current_graph_task_id() != -1


class AutocastCacheOff:
    """Keeps autocast from storing fake casts under the keys of real weights."""

    def __enter__(self) -> None:
        self._enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self._enabled)
