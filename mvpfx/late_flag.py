"""LateFlag: a yes or no from an accelerator that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


class LateFlag:
    """Copies a bool to the host in the background.

    Args:
        flag: bool scalar on a CUDA device.
    """

    def __init__(self, flag: Tensor) -> None:
        self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool | None:
        """What it is; None as long as the device has not come to it."""
        return bool(self._host) if self._arrival.query() else None
