"""What is made of the lines of CPU inference: curves, the tables of docs/cpu.md, the plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import inference_cells, inference_plot, inference_table
from benchmarks.inference_cells import Cell

ENVIRONMENT = {
    "processor": "P",
    "flags": ["avx512f", "amx_bf16"],
    "torch": "2",
    "onnxruntime": "1",
    "openvino": "not installed",
    "deepsparse": "not asked",
}


def line(density: float, mvpfx: float | None, batch: int = 1, **more: Any) -> dict[str, Any]:
    """A line with torch at 100 ms, onnxruntime at 80 in float32 and what mvpfx took."""
    cell: dict[str, Any] = {
        "model": "bert",
        "pattern": "unstructured",
        "block": None,
        "density": density,
        "batch": batch,
        "dtype": "fp32",
        "threads": 1,
        **more,
    }
    own: dict[str, Any] = {"median": mvpfx, "largest_output_difference": 2e-6}
    peer: dict[str, Any] = {"median": 80.0, "largest_output_difference": 1e-6}
    engines: dict[str, Any] = {
        "torch": {"median": 100.0, "largest_output_difference": 0.0},
        **({"mvpfx": {**own, "storages": {"dense": 12, "csr": 60}}} if mvpfx else {}),
        "onnxruntime": peer if cell["dtype"] == "fp32" else {"cannot": "no bf16"},
        "deepsparse": {"left_out": "no python"},
    }
    rest = {"shape": {"sequence": 128}, "rounds": 15, "environment": ENVIRONMENT}
    return {"cell": cell, "engines": engines, **rest}


def lines() -> list[dict[str, Any]]:
    return [
        line(0.1, 20.0, model="llama", dtype="bf16"),
        line(0.1, 25.0),
        line(0.5, 50.0),
        line(0.1, None, batch=16),
        line(1.0, 90.0, pattern="dense"),
        line(0.1, 10.0, pattern="blocks", block="4x4"),
    ]


def rows(text: str, header: str) -> list[str]:
    """The cells of the table whose header begins so, without the header."""
    found = text.splitlines()
    start = next(i for i, row in enumerate(found) if row.replace(" ", "").startswith(header))
    body = found[start + 2 : found.index("", start)]
    return [" | ".join(field.strip() for field in row.split("|")[1:-1]) for row in body]


def test_curves_begin_with_the_dense_model_and_are_in_order() -> None:
    found = inference_cells.curves(lines())
    known = [
        Cell("bert", "unstructured", None, 1.0, 1, "fp32", 1),
        Cell("bert", "unstructured", None, 1.0, 16, "fp32", 1),
        Cell("bert", "blocks", "4x4", 1.0, 1, "fp32", 1),
        Cell("llama", "unstructured", None, 1.0, 1, "bf16", 1),
    ]
    assert list(found) == known
    assert [list(curve) for curve in found.values()] == [[1.0, 0.5, 0.1], [0.1], [1.0, 0.1], [0.1]]
    assert found[known[0]][1.0] is found[known[2]][1.0]


def test_a_processor_that_stands_for_another_says_so() -> None:
    found = [one | {"environment": ENVIRONMENT | {"kept_to": "avx2"}} for one in lines()]
    text = inference_table.table({"avx2-p": found})
    assert text.startswith("### P, kept to avx2\n")
    assert "\nOn P (avx512f, amx_bf16), all kept to avx2, torch 2, " in text


def test_the_tables() -> None:
    text = inference_table.table({"amx": lines(), "none": []})
    assert text.splitlines()[:3] == [
        "### P, amx",
        "",
        "![Latency against density](images/cpu_inference_amx.svg)",
    ]
    assert (
        "Of 5 cells mvpfx gains least in this: 1.11x, "
        "bert, dense, density 1, batch 1, fp32, 1 thread(s)." in text.splitlines()
    )
    others = "| - | - | 80.0 | - | 100.0 |"  # deepsparse, openvino, onnxruntime, torch.compile
    end = "| 60 csr, 12 dense"
    assert rows(text, "|zeros|batch|density|mvpfx,ms|deepsparse,ms|openvino,ms|") == [
        f"none | 1 | 1 | 90.0 {others} 1.11x | 0.89x onnxruntime {end}",
        f"unstructured | 1 | 0.5 | 50.0 {others} 2.00x | 1.60x onnxruntime {end}",
        f"unstructured | 1 | 0.1 | 25.0 {others} 4.00x | 3.20x onnxruntime {end}",
        f"unstructured | 16 | 0.1 | - {others} - | - | ",
        f"blocks 4x4 | 1 | 0.1 | 10.0 {others} 10.00x | 8.00x onnxruntime {end}",
    ]
    dense, sparse = "1.11x, 0.89x onnxruntime", "4.00x, 3.20x onnxruntime"
    assert rows(text, "|model|zeros|dtype|batch|threads|1|0.5|0.1|") == [
        f"BERT-base | unstructured | fp32 | 1 | 1 | {dense} | 2.00x, 1.60x onnxruntime | {sparse}",
        "BERT-base | unstructured | fp32 | 16 | 1 |  |  | -",
        f"BERT-base | blocks 4x4 | fp32 | 1 | 1 | {dense} |  | 10.00x, 8.00x onnxruntime",
        "small Llama | unstructured | bf16 | 1 | 1 |  |  | 5.00x",
    ]
    assert text.splitlines()[-5:] == [
        "On P (avx512f, amx_bf16), torch 2, onnxruntime 1; sequences of 128 tokens, medians of 15 "
        "interleaved rounds.",
        "Outputs of mvpfx differ from torch's by at most 2e-06 in fp32, 2e-06 in bf16.",
        "",
        "- deepsparse is left out (BERT-base in fp32; small Llama in bf16): `no python`",
        "- onnxruntime cannot (small Llama in bf16): `no bf16`",
    ]


def test_the_summary() -> None:
    text = inference_table.summary({"amx": lines(), "none": []}) + "\n\n"
    assert rows(text, "|processor|dtype|batch|threads|50%|10%|") == [
        "P, amx | fp32 | 1 | 1 | 2.00x, 1.60x onnxruntime | 4.00x, 3.20x onnxruntime",
        "P, amx | fp32 | 16 | 1 |  | -",
    ]
    assert inference_table.summary({"amx": []}) == "No result file yet."


@pytest.mark.parametrize("found", [[], [line(1.0, 90.0, pattern="dense")]])
def test_no_curves_make_no_table_and_no_plot(found: list[dict[str, Any]], tmp_path: Path) -> None:
    assert inference_table.table({"amx": found}) == "No result file yet."
    assert inference_plot.draw(found, tmp_path / "plot.svg") is False
    assert list(tmp_path.iterdir()) == []


def test_the_plot_shows_the_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, again = tmp_path / "images" / "plot.svg", tmp_path / "again.svg"
    found = inference_plot.points(lines())
    assert {panel: list(engines) for panel, engines in found.items()} == {
        "unstructured, batch 1": ["mvpfx", "onnxruntime", "torch"],
        "unstructured, batch 16": ["onnxruntime", "torch"],
        "blocks 4x4, batch 1": ["mvpfx", "onnxruntime", "torch"],
    }
    own = found["unstructured, batch 1"]["mvpfx"]
    assert own == [(1.0, 90.0), (0.5, 50.0), (0.1, 25.0)]
    assert inference_plot.draw(lines(), path) and inference_plot.draw(lines()[::-1], again)
    text = path.read_text(encoding="utf-8")
    assert again.read_text(encoding="utf-8") == text
    assert f"points {inference_plot.digest(found)}" in text
    for shown in (*found, "mvpfx", "onnxruntime", "density", "BERT-base shape, fp32, 1 thread"):
        assert f">{shown}" in text
    assert ">deepsparse<" not in text
    lines_of_colour = re.findall(rf"stroke: {inference_plot.COLOURS['mvpfx']}; stroke-width", text)
    assert len(lines_of_colour) >= 2


def test_the_committed_plots_are_those_of_the_committed_lines() -> None:
    found = {
        inference_plot.file_name(processor): inference_plot.points(lines)
        for processor, lines in inference_cells.results().items()
    }
    drawn = {path.name: path for path in inference_plot.IMAGES.glob("cpu_inference*.svg")}
    assert set(drawn) == {name for name, points in found.items() if points}
    for name, path in drawn.items():
        assert f"points {inference_plot.digest(found[name])}" in path.read_text("utf-8")
        assert path.stat().st_size < 200_000
