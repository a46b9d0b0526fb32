"""The benchmark of many architectures: its models, its zeros, a short run and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks import architectures, results_file

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=99, max_position_embeddings=16, **TINY))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **TINY))


def test_zeros_are_in_repeated_linears_only() -> None:
    model = architectures.sparse(bert)
    for name, parameter in model.named_parameters():
        zeros = float((parameter == 0).float().mean())
        if ".layer." in name and parameter.dim() == 2:
            assert zeros == pytest.approx(1 - architectures.DENSITY, abs=0.05)
        elif parameter.dim() == 2 and "embeddings" not in name:
            assert zeros == 0


def test_inputs_fit() -> None:
    with torch.no_grad():
        for build, key, shape in (
            (bert, "input_ids", (1, 16)),
            (vit, "pixel_values", (1, 3, 16, 16)),
        ):
            inputs = architectures.example(build())
            assert inputs[key].shape == shape
            build()(**inputs)


def test_a_short_run_and_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(architectures, "FOLDER", tmp_path)
    monkeypatch.setattr(architectures, "ARCHITECTURES", {"BERT": bert, "ViT": vit})
    monkeypatch.setattr("sys.argv", ["architectures", "--rounds", "3"])
    architectures.main()
    (path,) = tmp_path.glob("*.json")
    assert path.stem == results_file.processor_kind()
    rows = json.loads(path.read_text())["rows"]
    assert [row["architecture"] for row in rows] == ["BERT", "ViT"]
    for row in rows:
        medians = [cast(float, row["ms"][name]["median_ms"]) for name in ("torch", "mvpfx")]
        assert row["faster"] == round(medians[0] / medians[1], 2)
        assert row["largest_difference"] <= 1e-4
    text = architectures.table(results_file.read_all(tmp_path))
    assert text.count("| BERT") == 1 and text.count("| ViT") == 1
    assert architectures.table([]) == "No result files yet."
