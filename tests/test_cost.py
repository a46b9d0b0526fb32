import pytest
import torch

from mvpfx.cost import compare, measure_storages, storage_bytes
from mvpfx.storage import Layout, SparseLinear


def test_bytes_are_those_of_the_layer() -> None:
    weight = torch.zeros(32, 16)
    weight[:16, :4] = 1
    cases: tuple[tuple[str, int, Layout], ...] = (
        ("csr", 1, "token_major"),
        ("bsr", 4, "token_major"),
        ("native", 1, "tiled"),
        ("native", 4, "tiled"),
    )
    for storage, block, layout in cases:
        layer = SparseLinear.from_dense(weight, None, block, layout)
        assert layer.storage == storage
        assert storage_bytes(storage, (32, 16), 64, 4, block) == layer.storage_bytes
    assert storage_bytes("reduced", (16, 4), 64, 4) == 256
    assert storage_bytes("native_dense", (16, 4), 64, 4) == 256
    known = "dense, reduced, native_dense, csr, bsr, native"
    with pytest.raises(ValueError, match=f"^unknown storage 'coo'; known: {known}$"):
        storage_bytes("coo", (1, 1), 1, 4)


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
