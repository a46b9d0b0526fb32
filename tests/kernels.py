"""What tests of native kernels share."""

from __future__ import annotations

from torch import Tensor


def largest(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())
