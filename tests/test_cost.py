from collections.abc import Callable

import pytest
import torch

from mvpfx.cost import LEAST_ROUNDS, compare, measure_storages


def test_compare_takes_turns() -> None:
    calls: list[str] = []
    times = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 4
    assert all(t.low_ms <= t.median_ms <= t.high_ms for t in times.values())


def test_compare_makes_fewer_rounds_where_they_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def clock(function: Callable[[], object]) -> float:
        function()
        return 100.0

    def rounds(budget_seconds: float) -> int:
        calls.clear()
        compare({"a": lambda: calls.append("a")}, rounds=10, budget_seconds=budget_seconds)
        return len(calls) - 2

    monkeypatch.setattr("mvpfx.cost._cpu_ms", clock)
    assert rounds(2) == 10
    assert rounds(0.5) == 5
    assert rounds(0.01) == LEAST_ROUNDS


def test_measuring_leaves_the_random_generator_alone(device: str) -> None:
    state = torch.get_rng_state()
    weight = torch.eye(16, device=device)
    times = measure_storages(weight, None, 4, {"csr": 1}, rounds=2)
    assert set(times) == {"dense", "csr"}
    assert torch.equal(state, torch.get_rng_state())
