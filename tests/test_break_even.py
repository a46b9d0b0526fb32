import json
from pathlib import Path

import pytest
import torch

from benchmarks.break_even import RESULTS, table
from benchmarks.results_file import processor, processor_flags
from mvpfx import break_even as module
from mvpfx.break_even import BREAK_EVEN, ELSEWHERE, break_even, storage_key
from mvpfx.kernels.library import LIBRARY, MISSING, isa, use_isa

FILES = sorted(RESULTS.glob("*.json"))


def test_every_table_was_measured() -> None:
    assert set(BREAK_EVEN) == {path.stem for path in FILES}
    assert f"{ELSEWHERE}-float32" in BREAK_EVEN


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_table_is_the_measured_one(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    measured = {
        storage: {
            size: {int(tokens): limit for tokens, limit in row.items()}
            for size, row in sizes.items()
        }
        for storage, sizes in table(result["points"]).items()
    }
    assert BREAK_EVEN[path.stem] == measured
    assert path.stem.endswith(f"-{result['dtype']}")


@pytest.mark.parametrize("processor", ["amx", "unheard-of"])
def test_limits_between_and_beside_what_was_measured(
    processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without a table takes the one of `ELSEWHERE`."""
    monkeypatch.setattr(module, "processor", lambda: processor)
    limits = BREAK_EVEN["amx-float32"]["csr"]["large"]
    assert break_even("csr", 128, 2**20, "cpu", torch.float32) == limits[128] > 0
    assert break_even("csr", 500, 2**20, "cpu", torch.float32) == min(limits[128], limits[1024])
    assert break_even("csr", 9999, 2**20, "cpu", torch.float32) == limits[1024]


def test_a_storage_without_an_entry_takes_the_one_of_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "processor", lambda: "avx2")
    monkeypatch.setattr(module, "isa", lambda: "avx2")
    own, others = BREAK_EVEN["avx2-float32"], BREAK_EVEN[f"{ELSEWHERE}-float32"]
    assert "csr" not in own
    assert break_even("csr", 128, 2**20, "cpu", torch.float32) == others["csr"]["large"][128]
    limit = own["native-avx2"]["large"][128]
    assert break_even("native", 128, 2**20, "cpu", torch.float32) == limit
    assert limit > others["native-avx2"]["large"][128]


def test_break_even_is_zero_where_nothing_was_measured() -> None:
    assert break_even("csr", 128, 2**20, "cpu", torch.float16) == 0.0
    assert break_even("csr", 128, 2**20, "cuda", torch.float32) == 0.0
    assert break_even("coo", 128, 2**20, "cpu", torch.float32) == 0.0


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
def test_native_kernels_are_known_by_their_instructions() -> None:
    best = isa()
    assert best is not None
    use_isa("plain")
    try:
        assert storage_key("native", torch.float32) == "native-plain"
        assert storage_key("csr", torch.float32) == "csr"
    finally:
        use_isa(best)
    if best == "avx512_bf16":  # products of float32 are those of avx512
        assert storage_key("native", torch.float32) == "native-avx512"
        assert storage_key("native", torch.bfloat16) == "native-avx512_bf16"


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
def test_pairs_of_bfloat16_are_for_processors_that_are_fast_at_them() -> None:
    """Intel's vectors are not, so that those of floats come first."""
    flags = processor_flags()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        pytest.skip("nothing multiplies pairs of bfloat16 here, or a matrix unit does")
    assert isa() == ("avx512" if "intel" in processor().lower() else "avx512_bf16")


@pytest.mark.parametrize(
    ("has_amx", "has_bf16", "kernels", "wanted"),
    [
        (True, True, "amx", "amx"),
        (False, True, "avx512", "avx512_bf16"),  # what Intel's are: dense products are torch's
        (False, False, "avx2", "avx2"),
        (False, False, None, "plain"),
    ],
)
def test_tables_go_by_what_dense_products_can_use(
    has_amx: bool,
    has_bf16: bool,
    kernels: str | None,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "has_amx", lambda: has_amx)
    monkeypatch.setattr(module, "has_avx512_bf16", lambda: has_bf16)
    monkeypatch.setattr(module, "isa", lambda: kernels)
    assert module.processor() == wanted
