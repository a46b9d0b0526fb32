"""Fused regions: modules of a converted model whose calls run as chains on native kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mvpfx.region import Region


@dataclass
class FusedRegion(Region):
    """The runtime of one region; what it cannot fuse runs the module's own forward.

    Gradients, autocast, and whatever traces the model (torch.compile, torch.export, ONNX) see the
    module as it is, with its sparse layers.

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
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
            or torch.onnx.is_in_onnx_export()
        ):
            return forward(module, *args, **kwargs)
        dtype = next(module.parameters()).dtype
        if dtype is not self.dtype:  # arguments may be token ids, which do not tell
            self.variants.clear()
            self.dtype = dtype
        return super().call(module, forward, args, kwargs)

    def _gave_up(self) -> bool:
        return any(isinstance(one, str) for known in self.variants.values() for one in known)
