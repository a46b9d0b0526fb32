"""The benchmark of where time goes: how samples are read, figures, a short run, the table."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mvpfx
from benchmarks import inference_profile, results_file
from benchmarks.hybrid_latency import Shape
from benchmarks.inference_models import Model
from benchmarks.inference_profile import OTHER, REST, kind, rates, read_report

NATIVE = "_native.cpython-311-x86_64-linux-gnu.so"
REPORT = f"""# Overhead;Shared Object;Symbol
# ........;.............;......

 60.00% ;{NATIVE};[.] avx512_bf16::multiply_strip<2, false, 4, true, 0, true>
 15.00% ;{NATIVE};[.] avx2::multiply_panel<2, false>
 10.00% ;{NATIVE};[.] avx2::attend_tile<false>
  5.00% ;{NATIVE};[.] avx2::gelus<4>
  2.00% ;{NATIVE};[.] std::_Function_handler<void (long), (anonymous namespace)::run>::_M_invoke
  8.00% ;libtorch_cpu.so                          ;[.] at::multiply<a; b>
"""


def test_samples_are_read_by_library_and_function() -> None:
    found = read_report(REPORT)
    assert len(found) == 6
    assert found[NATIVE, "[.] avx2::gelus<4>"] == pytest.approx(0.05)
    assert found["libtorch_cpu.so", "[.] at::multiply<a; b>"] == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        ("[.] avx512_bf16::multiply_strip<2, false, 4, true, 0, true>", "products"),
        ("[.] avx2::attend", "attention"),
        ("[.] avx2::normalize_strip<4>", "norms"),
        ("[.] (anonymous namespace)::run_product", OTHER),
    ],
)
def test_native_functions_have_a_kind(function: str, wanted: str) -> None:
    assert kind(NATIVE, function) == wanted
    assert kind("libtorch_cpu.so", function) == REST


def test_rates_follow_from_shares() -> None:
    found = rates(100.0, read_report(REPORT), gflop=6.0, limit=120.0)
    assert found["shares"]["products"] == pytest.approx(0.75)
    assert found["products_gflops"] == pytest.approx(6.0 / 0.075)
    assert found["ms_at_that_rate"] == pytest.approx(25 + 50)
    assert found["shares"][REST] == pytest.approx(0.08)
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_a_library_without_symbols_is_an_error() -> None:
    stripped = {(NATIVE, "[.] 0x0000000000012345"): 0.9, ("libc.so.6", "[.] memcpy"): 0.1}
    message = "^none of 2 functions is a product of the native library. It was stripped of its"
    with pytest.raises(RuntimeError, match=message):
        rates(100.0, stripped, gflop=6.0, limit=120.0)


def _none(name: str) -> None:
    return None


def test_without_perf_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", _none)
    with pytest.raises(RuntimeError, match=r"there is no perf on this machine\. Install it"):
        inference_profile.sampled(lambda: None, 1)


@pytest.mark.skipif(shutil.which("perf") is None, reason="there is no perf on this machine")
def test_a_short_run_and_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = Model(Shape(layers=1, hidden=64, heads=2, ffn=128, sequence=32, vocabulary=99))
    monkeypatch.setattr(inference_profile, "FOLDER", tmp_path)
    monkeypatch.setattr(inference_profile, "MODELS", {"bert": tiny})
    # Of so small a model no storage is surely faster than dense weights.
    monkeypatch.setattr(mvpfx, "convert", partial(mvpfx.convert, lowering="native"))
    arguments = ["--density", "0.5", "--batch", "2", "--rounds", "3", "--seconds", "2"]
    monkeypatch.setattr("sys.argv", ["inference_profile", *arguments])
    inference_profile.main()
    (path,) = tmp_path.glob("*.json")
    assert path.stem == results_file.processor_kind()
    (row,) = json.loads(path.read_text())["rows"]
    shares: dict[str, float] = row["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    assert row["gflops_without_zeros"] > 0
    text = inference_profile.table(results_file.read_all(tmp_path))
    assert f"| {row['ms']['median']:.1f} " in text
    assert inference_profile.table([]) == "No result files yet."


def test_shares_that_a_row_lacks_are_shown_as_none() -> None:
    row: dict[str, Any] = {
        "density": 0.1,
        "batch": 1,
        "ms": {"median": 10.0},
        **rates(10.0, read_report(REPORT), gflop=0.6, limit=120.0),
    }
    environment = {"processor": "a processor", "threads": 1, "torch": "2"}
    head = {"model": "bert", "kernels": "avx2", "rounds": 3, "seconds": 2}
    text = inference_profile.table([{**head, "environment": environment, "rows": [row]}])
    assert "0.0%" in text and "75.0%" in text and "a processor (avx2)" in text
