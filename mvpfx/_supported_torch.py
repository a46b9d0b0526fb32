"""Which torch the package was tested with, and what it needs of it that torch does not promise.

The first import of `mvpfx`: what is missing is named before anything else can fail for want of it.
"""

from __future__ import annotations

import importlib
import re
import warnings
from functools import cache

import torch

OLDEST = (2, 11)
NEWEST = (2, 14)
"""The first two numbers of the oldest and the newest torch that all tests were run with."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "torch._C": (
        "_set_grad_enabled",
        "_current_graph_task_id",
        "_are_functorch_transforms_active",
        "_len_torch_dispatch_stack",
        "_get_dispatch_mode",
        "_TorchDispatchModeKey",
        "_is_tracing",
        "_get_tracing_state",
        "_set_tracing_state",
    ),
    "torch._C._autograd": ("_top_saved_tensors_default_hooks", "_saved_tensors_hooks_is_enabled"),
    "torch._C._nn": ("linear",),
    "torch.cpu": ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    "torch._dispatch.python": ("enable_python_dispatcher",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch.fx.experimental.symbolic_shapes": (
        "DimDynamic",
        "GuardOnDataDependentSymNode",
        "ShapeEnv",
        "StatelessSymbolicContext",
    ),
    "torch.utils._pytree": ("tree_flatten", "tree_leaves", "tree_unflatten"),
    "torch.utils._sympy.functions": ("FloorDiv", "Max", "Min", "Mod", "PythonMod"),
    "torch.utils._sympy.printers": ("PythonPrinter",),
    "torch": ("is_autocast_cache_enabled", "set_autocast_cache_enabled", "_grouped_mm"),
    "torch._C._functorch": ("get_unwrapped", "is_batchedtensor", "is_functorch_wrapped_tensor"),
    "torch._functorch.pyfunctorch": ("temporarily_clear_interpreter_stack",),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch.nn.functional": ("_canonical_mask", "_none_or_dtype"),
    "torch.nn.modules.module": ("_has_any_global_hook",),
    "torch.multiprocessing.reductions": ("StorageWeakRef",),
    "torch.utils.checkpoint": ("_checkpoint_without_reentrant_generator", "CheckpointFunction"),
    "torch.utils._python_dispatch": ("TorchDispatchMode", "_disable_current_modes"),
    "torch.overrides": ("TorchFunctionMode", "is_tensor_method_or_property"),
}
"""Private names by module. `torch._dynamo.source.ConstantSource`, which imports the compiler of
torch, is looked for when first needed.
"""


def check_names(required: dict[str, tuple[str, ...]]) -> None:
    """Look for private names of torch.

    Args:
        required: names by module.

    Raises:
        ImportError: some are missing; the message has all of them.
    """
    missing: list[str] = []
    for module, names in required.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    if missing:
        raise ImportError(
            f"mvpfx needs {', '.join(missing)}, which torch {torch.__version__} does not have. "
            f"It was tested with torch {_text(OLDEST)} to {_text(NEWEST)}: install one of these, "
            "or a newer mvpfx."
        )


def is_newer_than_tested(version: str) -> bool:
    """Whether a version of torch came after those that were tested.

    >>> is_newer_than_tested("2.14.1+cpu"), is_newer_than_tested("3.0.0a0")
    (False, True)
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > NEWEST


def warn_if_untested() -> None:
    """Say once that a torch newer than those tested may compute something else."""
    _warn_if_untested(torch.__version__)


@cache
def _warn_if_untested(version: str) -> None:
    if is_newer_than_tested(version):
        warnings.warn(
            f"mvpfx was not tested with torch {version}, only with {_text(OLDEST)} to "
            f"{_text(NEWEST)}. Compare outputs with and without masks before you rely on them, or "
            f"install torch {_text(NEWEST)}.",
            stacklevel=4,
        )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


check_names(REQUIRED)
