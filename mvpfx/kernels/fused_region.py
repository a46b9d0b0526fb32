"""Fused regions: modules of a converted model whose calls run as chains on native kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.net import caught
from mvpfx.region import Region
from mvpfx.torch_private import pytree
from mvpfx.traces import dispatch_modes_active
from mvpfx.transformers_types import is_cache


@dataclass
class FusedRegion(Region):
    """The runtime of one region; what it cannot fuse runs the module's own forward.

    Where a gradient is asked for, under autocast, and where something traces the model
    (torch.compile, torch.export, ONNX) the module runs as it is, with its sparse layers.

    Attributes:
        once: whether to give up at the first call that has no graph; regions inside of this one
            then serve.
        dtype: of the module's parameters when its calls were captured.
    """

    once: bool = False
    dtype: torch.dtype | None = None

    def call(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one call."""
        if (
            (self.once and self._gave_up())
            or torch.is_autocast_enabled("cpu")
            or dispatch_modes_active()
            or (torch.is_grad_enabled() and self._needs_gradient(module, args, kwargs))
        ):
            return forward(module, *args, **kwargs)
        dtype = next((p.dtype for p in module.parameters()), None)
        if dtype is not self.dtype:  # arguments may be token ids, which do not tell
            self.variants.clear()
            self.dtype = dtype
        return super().call(module, forward, args, kwargs)

    def _needs_gradient(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a gradient is asked for of anything that the call reads, or may be."""
        try:
            return self._reads_gradient(module, args, kwargs)
        except Exception as error:  # noqa: BLE001  the net
            self.decline(caught(error, "looking for gradients"))
            return True

    def _reads_gradient(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        for part in self.configuration.modules(module):
            for parameter in part._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    return True
        given = pytree.tree_leaves((args, kwargs), is_leaf=is_cache)
        return any(isinstance(value, Tensor) and value.requires_grad for value in given)

    def _gave_up(self) -> bool:
        return any(isinstance(one, str) for known in self.variants.values() for one in known)
