"""The benchmark of inference on a CPU: its cells and zeros, every engine, its lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_inference, engines, inference_cells, inference_models, results_file
from benchmarks.hybrid_latency import Shape
from benchmarks.inference_cells import Cell
from benchmarks.inference_models import MODELS, Model

SHAPE = Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=99, sequence=8, block=8)
TINY = {"bert": Model(SHAPE), "llama": Model(SHAPE, decoder=True)}
ORT = """
import numpy, onnxruntime
__version__ = "0.1"

class Engine:
    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.input_names = [each.name for each in self.session.get_inputs()]
    def run(self, arrays):
        return self.session.run(None, dict(zip(self.input_names, arrays)))

def compile_model(path, batch_size, num_cores):
    return Engine(path)
"""
ONE = "--model bert --pattern unstructured --density 0.2 --batch 2 --dtype fp32 --threads 1"
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on tiny models; the lines of the result file."""
    for name, model in TINY.items():
        monkeypatch.setitem(MODELS, name, model)
    output = tmp_path / "lines.jsonl"

    def running(words: str, *more: object) -> list[dict[str, Any]]:
        cpu_inference.main(
            [*words.split(), "--rounds", "3", "--output", str(output), *map(str, more)]
        )
        return [json.loads(line) for line in output.read_text().splitlines()]

    return running


@pytest.mark.parametrize("name", list(TINY))
def test_every_engine_agrees_with_torch(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    (tmp_path / "deepsparse.py").write_text(ORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    asked = "--engines mvpfx onnxruntime openvino deepsparse"
    words = f"{ONE} {asked}".replace("bert", name)
    (line,) = run(words, "--deepsparse-python", sys.executable)
    assert line["cell"] == {
        "model": name,
        "pattern": "unstructured",
        "block": None,
        "density": 0.2,
        "batch": 2,
        "dtype": "fp32",
        "threads": 1,
    }
    found = line["engines"]
    assert list(found) == ["torch", *asked.split()[1:]]
    for each in found.values():
        assert 0 < each["q1"] <= each["median"] <= each["q3"]
        assert each["faster"] == pytest.approx(found["torch"]["median"] / each["median"], rel=1e-2)
        assert each["largest_output_difference"] <= 1e-4
    linears = len(inference_models.pruned_linears(inference_models.build(TINY[name])))
    assert linears <= sum(found["mvpfx"]["storages"].values()) <= linears + 2
    assert len(line["cores"]) == 1 and line["rounds"] == 3 and line["shape"]["ffn"] == 96
    environment = line["environment"]
    assert environment["deepsparse"] == "0.1" and environment["threads"] == 1
    assert environment["openvino"][0].isdigit() and environment["onnxruntime"][0].isdigit()
    assert environment["processor"] and isinstance(environment["flags"], list)
    assert str(tmp_path) not in json.dumps(line)
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def test_bf16_runs_where_there_is_bf16(run: Run) -> None:
    pytest.importorskip("openvino")
    words = ONE.replace("fp32", "bf16").replace("unstructured", "hybrid")
    (line,) = run(f"{words} --engines torch mvpfx onnxruntime openvino deepsparse")
    found = line["engines"]
    reason = "NotImplementedError: its CPU kernels take no bf16"
    assert found["onnxruntime"] == {"cannot": reason}
    assert found["deepsparse"] == {"left_out": "no --deepsparse-python was given"}
    assert {"reduced", "native_dense"} & set(found["mvpfx"]["storages"])
    for name in ("mvpfx", "openvino"):
        assert found[name]["largest_output_difference"] <= 0.02


@pytest.mark.slow
# Inductor's own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_compile_agrees_with_torch(run: Run) -> None:
    (line,) = run(f"{ONE} --engines torch.compile")
    found = line["engines"]["torch.compile"]
    assert found.get("largest_output_difference", 1.0) <= 1e-4, found


def test_a_peers_error_is_its_answer_and_ours_is_raised(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(task: engines.Task) -> engines.Engine:
        raise ValueError("not\n  this one")

    monkeypatch.setitem(engines.ENGINES, "torch.compile", refuse)
    (line,) = run(f"{ONE} --engines torch.compile")
    assert line["engines"]["torch.compile"] == {"cannot": "ValueError: not this one"}
    monkeypatch.setitem(engines.ENGINES, "mvpfx", refuse)
    with pytest.raises(ValueError, match=r"^not\n  this one$"):
        run(f"{ONE} --engines mvpfx")


def test_an_engine_that_computes_something_else_has_no_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(task: engines.Task) -> engines.Engine:
        engine = engines.torch_eager(task)
        return engines.InProcess(engine.output, lambda found: found + 0.5)

    monkeypatch.setitem(engines.ENGINES, "openvino", wrong)
    reason = "its outputs differ from those of torch by 5.0e-01; at most 1.0e-03 was to be expected"
    (line,) = run(f"{ONE} --engines openvino")
    assert line["engines"]["openvino"] == {"cannot": f"RuntimeError: {reason}"}
    monkeypatch.setitem(engines.ENGINES, "mvpfx", wrong)
    with pytest.raises(RuntimeError, match=f"^{re.escape(reason)}$"):
        run(f"{ONE} --engines mvpfx")
    nothing = torch.full((2,), torch.nan)
    message = reason.replace("5.0e-01", "nan")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        cpu_inference.differing(torch.zeros(2), nothing, "fp32")


def test_a_cell_is_measured_once(run: Run) -> None:
    lines = run(f"{ONE} --engines torch")
    assert list(lines[0]["engines"]) == ["torch"]
    assert run(f"{ONE} --engines torch") == lines
    assert len(run(f"{ONE} --engines torch --again")) == 2
    assert len(run(f"{ONE} --engines torch mvpfx")) == 3  # one that the line does not have
    assert len(run(f"{ONE} --engines mvpfx")) == 3
    assert len(run(f"{ONE} --engines deepsparse")) == 3  # which it cannot have now
    assert len(run(ONE.replace("0.2", "0.2 1") + " --engines torch")) == 4
    assert len(run(f"{ONE} --engines torch", "--rounds", 4)) == 5


def test_of_two_lines_of_a_cell_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert inference_cells.done(path) == {}
    cell = {"model": "bert", "pattern": "blocks", "block": "4x4", "density": 0.5, "batch": 1}
    cell |= {"dtype": "fp32", "threads": 2}
    lines = [{"cell": cell, "rounds": rounds} for rounds in (3, 7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = Cell("bert", "blocks", "4x4", 0.5, 1, "fp32", 2)
    assert inference_cells.done(path) == {known: lines[1]}
    assert str(known) == "bert, blocks 4x4, density 0.5, batch 1, fp32, 2 thread(s)"


def test_the_command_line_filters() -> None:
    everything = inference_cells.cells(cpu_inference.parse([]))
    per_setting = 3 * 5 + 1  # patterns at densities below 1, and the dense model
    assert len(everything) == len(set(everything)) == 3 * per_setting * 2 * 2 * 2
    assert {cell.block for cell in everything if cell.pattern == "blocks"} == {"4x4"}
    assert {cell.block for cell in everything if cell.pattern != "blocks"} == {None}
    assert {cell.density for cell in everything if cell.pattern == "dense"} == {1.0}
    words = f"{ONE} --pattern blocks --density 0.1 0.05 --block 1x4"
    assert inference_cells.cells(cpu_inference.parse(words.split())) == [
        Cell("bert", "blocks", "1x4", 0.1, 2, "fp32", 1),
        Cell("bert", "blocks", "1x4", 0.05, 2, "fp32", 1),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--block 4", "--block 4: rows x columns are needed, as in 4x4"),
        ("--density 0", "--density [0.0]: a fraction kept, above 0 and at most 1"),
        ("--rounds 1", "--rounds 1: at least 2 are needed for quartiles"),
        (
            "--deepsparse-python nowhere",
            "--deepsparse-python nowhere: there is no such file; give a python",
        ),
    ],
)
def test_bad_words_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cpu_inference.parse(words.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"python -m benchmarks.cpu_inference: error: {message}"


def test_engines_that_nothing_keeps_to_avx2_are_refused_beside_those_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_file, "KEPT_TO", "avx2")
    with pytest.raises(SystemExit):
        cpu_inference.parse(["--engines", "mvpfx", "openvino"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--engines openvino: nothing keeps them to AVX2; name torch mvpfx")
    assert cpu_inference.parse(["--engines", "mvpfx"]).engines == ["mvpfx"]


def test_each_number_of_threads_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def called(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode=0 if len(asked) < 2 else 3)

    monkeypatch.setattr(subprocess, "run", called)
    with pytest.raises(SystemExit, match=r"^3$"):
        cpu_inference.main(["--threads", "1", "2", "4", "--model", "bert"])
    parsed = [cpu_inference.parse(command[3:]) for command in asked]
    assert [command[1:3] for command in asked] == [["-m", "benchmarks.cpu_inference"]] * 2
    assert [(found.threads, found.model) for found in parsed] == [([1], ["bert"]), ([2], ["bert"])]


def test_more_threads_than_cores_are_refused() -> None:
    cores = sorted(os.sched_getaffinity(0))
    message = (
        f"1000 threads want as many cores, and this process may use {len(cores)} ({cores}). "
        f"Ask for fewer: --threads {len(cores)}"
    )
    with (
        pytest.raises(ValueError, match=f"^{re.escape(message)}$"),
        cpu_inference.pinned(1000),
    ):
        pass


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("pattern", inference_models.PATTERNS)
def test_the_zeros_are_as_many_as_the_density_says(name: str, pattern: str) -> None:
    model = TINY[name]
    dense = inference_models.build(model)
    found = inference_models.zeroed(dense, model, pattern, 0.25, (4, 2))
    linears = inference_models.pruned_linears(found)
    assert len(linears) == SHAPE.layers * (7 if model.decoder else 6)
    kept = sum(int(linear.weight.count_nonzero()) for linear in linears.values())
    total = sum(linear.weight.numel() for linear in linears.values())
    assert kept / total == pytest.approx(0.25, abs=1e-9)
    if pattern == "hybrid":
        return
    for linear in linears.values():
        assert int(linear.weight.count_nonzero()) == linear.weight.numel() / 4
        rows, columns = linear.weight.shape
        tiles = linear.weight.view(rows // 4, 4, columns // 2, 2).count_nonzero((1, 3))
        whole = set(tiles.unique().tolist()) == {0, 8}
        assert whole == (pattern == "blocks")
    others = {n: p for n, p in found.named_parameters() if n.removesuffix(".weight") not in linears}
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in others.items())


def test_hidden_units_of_llama_go_whole() -> None:
    model = TINY["llama"]
    found: Any = inference_models.zeroed(
        inference_models.build(model), model, "hybrid", 0.25, (1, 1)
    )
    for layer in found.model.layers:
        ffn = layer.mlp
        live = ffn.gate_proj.weight.count_nonzero(1) > 0
        assert int(live.sum()) == 24
        assert torch.equal(live, ffn.up_proj.weight.count_nonzero(1) > 0)
        assert torch.equal(live, ffn.down_proj.weight.count_nonzero(0) > 0)


def test_blocks_that_do_not_tile_are_refused() -> None:
    model = TINY["bert"]
    message = (
        "bert.encoder.layer.0.attention.self.query.weight is 64 x 64, which blocks of 4 x 5 do not "
        "tile. Give --block sizes that divide it, as in --block 4x4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        inference_models.zeroed(inference_models.build(model), model, "blocks", 0.5, (4, 5))
