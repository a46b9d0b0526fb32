import torch

from mvpfx.cost import compare, measure_storages


def test_compare_takes_turns() -> None:
    calls: list[str] = []
    times = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 4
    assert all(t.low_ms <= t.median_ms <= t.high_ms for t in times.values())


def test_measuring_leaves_the_random_generator_alone(device: str) -> None:
    state = torch.get_rng_state()
    weight = torch.eye(16, device=device)
    times = measure_storages(weight, None, 4, {"csr": 1}, rounds=2)
    assert set(times) == {"dense", "csr"}
    assert torch.equal(state, torch.get_rng_state())
