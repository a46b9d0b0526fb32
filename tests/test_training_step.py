"""The benchmark of training steps: its cases, its counts of memory, its table; a tiny run of it."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import training_cases, training_step, training_step_table
from benchmarks.naive_movement import NaiveLinear, TopV, prune_naively
from benchmarks.training_cases import ACCUMULATING, BLOCKS, DENSE, MOVEMENT, Shape, make_step
from mvpfx.scheduler import masks_of
from mvpfx.top_v import top_v
from mvpfx.training_kernels import library
from tests.toy_masks import values

CPU = torch.device("cpu")
TINY = Shape("tiny", hidden=32, layers=2, heads=2, ffn=64, vocabulary=40)


def test_the_naive_module_keeps_what_ours_keeps() -> None:
    scores = values(30, 20).round()
    mask: Any = TopV.apply(scores, 0.3)
    assert torch.equal(mask.bool(), top_v([scores], 180)[0])
    layer = nn.Linear(20, 30)
    naive = NaiveLinear(layer, 0.3, (10, 5))
    found = naive(values(2, 20))
    units = top_v([naive.scores], round(0.3 * 12))[0]
    kept = units.repeat_interleave(10, 0).repeat_interleave(5, 1)
    wanted = nn.functional.linear(values(2, 20), layer.weight * kept, layer.bias)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert naive.scores.grad is not None and layer.weight.grad is not None
    assert not layer.weight.grad[~kept].any()


def test_all_linear_layers_of_the_encoder_are_pruned() -> None:
    model = prune_naively(TINY.model(CPU), 0.15)
    layers = [m for m in model.modules() if isinstance(m, NaiveLinear)]
    assert sum(layer.weight.numel() for layer in layers) == TINY.prunable
    ours = make_step(MOVEMENT, TINY, 64, CPU)
    assert sum(mask.units for mask in masks_of(ours.model)) == TINY.prunable


@pytest.mark.slow
@pytest.mark.parametrize("case", training_cases.ALL, ids=lambda case: case.name)
def test_every_case_takes_steps(case: training_cases.Case) -> None:
    step = make_step(case, TINY, 64, CPU)
    assert step() > 0
    assert step() > 0
    if step.scheduler is not None:
        assert step.scheduler.step_count == training_cases.DONE + 2
        density = step.scheduler.density
        assert density is None or training_cases.DENSITY < density < 1


@pytest.mark.slow
def test_peak_memory_is_that_of_tensors() -> None:
    shape = Shape("wide", hidden=512, layers=1, heads=2, ffn=1024, vocabulary=40)
    widest = shape.hidden * shape.ffn / shape.prunable
    peaks = {
        case.name: training_cases.peak_bytes(lambda c=case: make_step(c, shape, 32, CPU), CPU)
        for case in (DENSE, MOVEMENT, ACCUMULATING, BLOCKS)
    }
    parameters = sum(p.numel() for p in shape.model(CPU).parameters())
    assert peaks["dense"] == pytest.approx(16 * parameters, rel=0.1)
    extra = {n: (peak - peaks["dense"]) / shape.prunable for n, peak in peaks.items()}
    mask = 1 / 8 if library.LIBRARY else 1
    assert extra["movement"] == pytest.approx(16 + mask, abs=0.2), "here the gradients are the peak"
    # Without the native library a site's gradient, its change and a spare, one site at a time.
    spare = 0 if library.LIBRARY else 12 * widest
    assert extra["movement, accumulate"] == pytest.approx(5 + spare, abs=0.2)
    assert extra["movement, 32 x 32"] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_models_of_earlier_measurements_do_not_count() -> None:
    def make() -> training_cases.Step:
        gc.collect()  # as may happen at any time, and masks know their models in cycles
        return make_step(MOVEMENT, TINY, 32, CPU)

    first = training_cases.peak_bytes(make, CPU)
    assert training_cases.peak_bytes(make, CPU) == first


@pytest.mark.slow
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "SHAPES", {"tiny": TINY})
    path = tmp_path / "result.json"
    common = ["--rounds", "2", "--output", str(path)]
    training_step.main(["--tokens", "64", "--mode", "eager", "--cases", "main", *common])
    training_step.main(["--alone", "--tokens", "64", "--scores", "100000", *common])
    result = json.loads(path.read_text())
    (cell,) = result["cells"]
    assert [row["case"] for row in cell["rows"]] == [case.name for case in training_cases.MAIN]
    assert cell["rows"][0]["time_over_dense"] == 1.0
    assert result["threshold"]["extra_memory"] < 1
    assert [row["shape"] for row in result["evaluation"]] == ["tiny"]
    training_step.main(["--tokens", "64", "--mode", "eager", "--cases", "main", *common])
    again = json.loads(path.read_text())
    assert len(again["cells"]) == 1 and again["threshold"] == result["threshold"]
    training_step.main(["--tokens", "64", "--mode", "eager", "--cases", "second-order", *common])
    (cell,) = json.loads(path.read_text())["cells"]
    others = {row["case"]: row for row in cell["rows"]}
    second_order = others.pop("second_order")
    assert second_order["bytes_a_prunable_weight"] > 200, "50 numbers a weight"
    assert list(others) == [row["case"] for row in again["cells"][0]["rows"]], "where they were"
    assert others["movement"] == again["cells"][0]["rows"][1]
    text = training_step_table.table([result])
    assert text.count("| movement, accumulate ") == 2, "time and memory"
    assert "The exact threshold of 0 M scores" in text
    assert training_step_table.table([]) == "No result file yet."


def test_kept_memory_is_no_setting_of_what_is_measured_alone(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        training_step.main(["--alone", "--keep-memory", "--output", str(path)])
    assert not path.exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
@pytest.mark.parametrize("kept", [False, True])
def test_kept_memory_stays_with_the_process(kept: bool) -> None:
    count, megabyte = 40, 2**20
    code = f"""
import os
import torch
from benchmarks import training_step
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
if {kept}:
    training_step.keep_memory()
before = resident()
held = [torch.ones({4 * megabyte} // 4) for _ in range({count})]
del held
print(resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > count * 3 * megabyte) == kept
