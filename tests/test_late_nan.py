"""LateNan: nobody waits for the answer, and nobody misses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvpfx.late_nan import LateNan
from tests.toy_masks import values


class Arrival:
    def __init__(self) -> None:
        self.is_there = False

    def query(self) -> bool:
        return self.is_there


class Simulated(LateNan):
    """One whose answers come when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []

    def _ask(self, values: Tensor) -> tuple[Tensor, Any]:
        self.arrivals.append(Arrival())
        return values.isnan().any(), self.arrivals[-1]


def test_the_answer_is_told_when_it_is_there() -> None:
    late = Simulated()
    sound, broken = torch.zeros(3), torch.tensor([0.0, float("nan")])
    assert not late.found(broken)
    assert not late.found(broken), "not there yet"
    assert len(late.arrivals) == 1, "one question at a time"
    late.arrivals[-1].is_there = True
    assert late.found(sound)
    late.arrivals[-1].is_there = True
    assert not late.found(sound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    late = LateNan()
    scores = values(1000, device="cuda")
    scores[7] = float("nan")
    late.found(scores)
    torch.cuda.synchronize()
    assert late.found(scores)
