"""The benchmarks: batches, the structured preset, the command line, two short runs end to end."""

# pyright: reportUnknownParameterType=false

import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from benchmarks import fine_prune, measure, presets, results_file, training, workloads
from benchmarks.workloads import Sentences, batches


def sentences(lengths: list[int]) -> Sentences:
    return Sentences([[7] * n for n in lengths], [i % 2 for i in range(len(lengths))], padding=0)


def test_batches_hold_every_example_once() -> None:
    split = sentences([3, 9, 1, 5, 2, 8, 4])
    for shuffle in (None, random.Random(0)):
        found = [b["attention_mask"].sum(1).tolist() for b in batches(split, 3, shuffle)]
        assert sorted(n for batch in found for n in batch) == [1, 2, 3, 4, 5, 8, 9]
        assert sorted(len(batch) for batch in found) == [1, 3, 3]


def test_a_batch_is_padded_to_its_longest_sentence() -> None:
    batch = sentences([1, 3]).batch([0, 1])
    assert batch["input_ids"].tolist() == [[7, 0, 0], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_a_run_has_as_many_steps_as_batches() -> None:
    split = sentences([1] * 10)
    recipe = training.Recipe(epochs=2, batch_size=3, lr=1.0, score_lr=1.0, seed=0)
    assert recipe.total_steps(split) == 2 * len(list(batches(split, 3))) == 8


def test_learning_rate_rises_and_falls_linearly() -> None:
    recipe = training.Recipe(epochs=1, batch_size=1, lr=1.0, score_lr=1.0, seed=0, warmup=0.2)
    factor = training.warmup_and_decay(recipe, 10)
    assert [factor(step) for step in range(11)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    )


def test_the_structured_preset_scores_output_projections_only() -> None:
    found = presets.heads_and_channels(workloads.digits(seed=0).model)
    kept = {name: rule for name, rule in found.items() if rule is not None}
    assert kept == {
        **{f"vit.layers.{i}.attention.o_proj": {"granularity": "head"} for i in range(4)},
        **{f"vit.layers.{i}.mlp.fc2": {"granularity": "column"} for i in range(4)},
    }
    assert found["classifier"] is None
    assert found["vit.layers.0.attention.q_proj"] is None


def test_missing_data_is_named() -> None:
    message = (
        "nowhere/train.tsv does not exist. --data takes a folder with train.tsv and test.tsv, "
        "UTF-8, one example a line: sentence<TAB>label"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        workloads.read_lines(Path("nowhere/train.tsv"))


def test_model_and_data_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fine_prune.parse(["--model", "somewhere"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "python -m benchmarks.fine_prune: error: "
        "--model and --data belong together: give both, or neither"
    )


def test_every_model_is_timed() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    found = measure.interleaved_ms({"a": Double(), "b": Double()}, {"x": torch.ones(3)}, 4)
    assert list(found) == ["a", "b"]
    assert all(0 < times.q1 <= times.median <= times.q3 for times in found.values())


def test_the_main_job_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    short = ["--epochs", "1", "--dense-epochs", "1", "--rounds", "3", "--output", str(output)]
    fine_prune.main(short)
    (result,) = results_file.read_all(tmp_path)
    assert result["largest_output_difference"] <= 1e-4
    sizes = result["parameters_outside_embeddings"]
    assert sizes["converted"] < 0.3 * sizes["dense"]
    assert result["file_bytes"]["converted"] < 0.4 * result["file_bytes"]["dense"]
    assert "vit.layers.0.mlp.fc2" in capsys.readouterr().out


def tiny_encoder(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    BertModel(config).save_pretrained(folder)


@pytest.mark.parametrize("granularity", presets.GRANULARITIES)
def test_the_main_job_runs_on_folders(granularity: str, tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "model")
    lines = [
        f"a {word} film{' film' * i}\t{label}"
        for i in range(8)
        for label, word in enumerate(("bad", "good"))
    ]
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    output = tmp_path / "results" / "tiny.json"
    options = {
        "--model": str(tmp_path / "model"),
        "--data": str(tmp_path),
        "--name": "tiny",
        "--granularity": granularity,
        "--density": "0.25",
        "--epochs": "2",
        "--batch-size": "4",
        "--rounds": "3",
        "--output": str(output),
    }
    fine_prune.main([word for pair in options.items() for word in pair])
    (result,) = results_file.read_all(output.parent)
    assert result["workload"] == "tiny"
    assert result["examples"] == {"train": 16, "test": 16}
    assert result["timed"].startswith("1 sequence of ")
    assert result["largest_output_difference"] <= 1e-4
    assert str(tmp_path) not in output.read_text()
