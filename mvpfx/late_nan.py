"""LateNan: whether values on an accelerator hold NaN, told when it is known, without waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateNan:
    """Asks a CUDA device, goes on, and looks at the answer when it is asked the next time."""

    def __init__(self) -> None:
        self._answer: Tensor | None = None
        self._arrival: Any = None

    def found(self, values: Tensor) -> bool:
        """Whether `values` of an earlier call held NaN; False as long as nobody knows.

        Args:
            values: on a CUDA device; asked about where no question is under way.
        """
        if self._answer is not None and not self._arrival.query():
            return False
        found = self._answer is not None and bool(self._answer)
        self._answer, self._arrival = self._ask(values)
        return found

    def _ask(self, values: Tensor) -> tuple[Tensor, Any]:
        """Where the answer will be, and what tells that it is there."""
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(values.isnan().any(), non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(values.device))
        return answer, arrival
