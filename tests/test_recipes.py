"""The recipes end to end, on tiny files: train, resume, convert, score."""

# datasets and transformers annotate themselves in part only.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
)

import mvpfx
from benchmarks.recipes import pruning
from benchmarks.recipes.command import main
from tests.small_run import raises

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "in", "a", "mat", "house", "what", "who", "?"]
SENTENCES = {
    "mnli": ("premise", "hypothesis", ("train", "validation_matched", "validation_mismatched")),
    "qqp": ("question1", "question2", ("train", "validation")),
}
Rows = list[dict[str, Any]]


def tiny_model(folder: Path, classes: int | None = None, seed: int = 0, **changed: Any) -> str:
    """Save a BERT of two layers and its tokenizer; it answers questions unless it has classes."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    values: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if classes:
        values["id2label"] = {number: f"LABEL_{number}" for number in range(classes)}
    config = BertConfig(**{**values, **changed})
    torch.manual_seed(seed)
    kind: Any = AutoModelForSequenceClassification if classes else AutoModelForQuestionAnswering
    kind.from_config(config).save_pretrained(folder)
    return str(folder)


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS[:-1]) for _ in range(words))


def pairs(task: str, classes: int, count: int = 12) -> Rows:
    """Pairs of sentences in classes."""
    chance = random.Random(0)
    first, second, _ = SENTENCES[task]
    return [
        {first: sentence(chance, 5), second: sentence(chance, 3 + i % 3), "label": i % classes}
        for i in range(count)
    ]


def questions(count: int = 6) -> Rows:
    """Questions whose answer is two words of a context that is too long for one feature."""
    chance, rows = random.Random(0), Rows()
    for number in range(count):
        words = sentence(chance, 40).split()
        begin, text = 5 * number + 3, " ".join(words[5 * number + 3 :][:2])
        answers = {"text": [text], "answer_start": [len(" ".join(words[:begin])) + 1]}
        question = f" {sentence(chance, 3)} ?"
        rows.append({"context": " ".join(words), "question": question, "answers": answers})
    return rows


def write_files(folder: Path, form: str, splits: Sequence[str], rows: Rows) -> str:
    """Write the same rows for each split, as csv, jsonl or parquet; returns the folder."""
    folder.mkdir()
    for split in splits:
        path = folder / f"{split}.{form}"
        if form == "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif form == "parquet":
            Dataset.from_list(rows).to_parquet(str(path))
        else:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def command(task: str, model: str, data: str, output: Path, *options: object) -> list[str]:
    fixed = ("--model", model, "--data", data, "--output", output, "--batch-size", 4)
    return [task, *map(str, (*fixed, "--device", "cpu", *options))]


def written(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def test_mnli_from_csv(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_files(tmp_path / "mine", "csv", SENTENCES["mnli"][2], pairs("mnli", 3))
    output = tmp_path / "out"
    result = main(command("mnli", model, data, output, "--density", 0.1, "--max-steps", 8))
    assert result == written(output) and str(tmp_path) not in json.dumps(result)
    assert result["settings"]["model"] == "tiny" and result["settings"]["data"] == "mine"
    figures = result["figures"]
    assert list(figures["masked"]) == ["accuracy_matched", "accuracy_mismatched"]
    assert figures["masked"] == figures["converted"]
    assert result["density"] == pytest.approx(0.1, abs=1e-3)
    steps = {"total_steps": 8, "warmup_steps": 1, "cooldown_steps": 2, "paper_total_steps": 73632}
    assert result["steps"] == steps
    published = {"accuracy_matched": 79.3, "accuracy_mismatched": 79.5}
    assert result["published"] == {**published, "source": "Sanh et al. 2020, Table 2"}
    assert result["features"] == dict.fromkeys(SENTENCES["mnli"][2], 12)
    assert result["environment"]["datasets"] != "not installed"
    printed = capsys.readouterr().out
    assert (
        "The run has 8 optimizer steps and the paper's 73632: warm-up and cool-down are 1 and 2 "
        "steps instead of 12000 and 24000.\n"
    ) in printed
    assert "; published: 79.5 (Sanh et al. 2020, Table 2)\n" in printed
    converted = torch.load(output / "converted.pt", weights_only=False)
    assert mvpfx.sparsity_table(converted).splitlines() == result["table"]


def test_qqp_from_lines_of_json(model: str, tmp_path: Path) -> None:
    data = write_files(tmp_path / "data", "jsonl", SENTENCES["qqp"][2], pairs("qqp", 2))
    soft = ("--criterion", "soft_movement", "--precision", "bf16", "--epochs", 2)
    result = main(command("qqp", model, data, tmp_path / "out", *soft))
    assert result["figures"]["masked"].keys() == {"accuracy", "f1"}
    assert result["steps"]["total_steps"] == 6 and result["published"] is None
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-6"
    config = mvpfx.pruning_config(checkpoint)
    assert (config.criterion, config.threshold) == ("soft_movement", 0.1)
    assert (config.score_init, config.penalty_lambda) == ("zero", None)
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (arguments.learning_rate, arguments.adam_epsilon) == (3e-5, 1e-8)
    assert (arguments.max_grad_norm, arguments.weight_decay) == (1.0, 0.0)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == [3e-5, 3e-5, 1e-2]
    before, after = (load_file(f"{place}/model.safetensors") for place in (model, checkpoint))
    same = {name for name, value in after.items() if torch.equal(value, before.get(name, -value))}
    embeddings = {name for name in after if name.startswith("bert.embeddings")}
    assert same == embeddings and embeddings, "all but the embeddings learns"


def test_squad_from_parquet_with_a_teacher_stopped_and_taken_up_again(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_files(tmp_path / "data", "parquet", ("train", "validation"), questions())
    teacher = tiny_model(tmp_path / "teacher", seed=1)
    output, narrow = tmp_path / "out", ("--max-length", 24, "--doc-stride", 8)
    short = ("--max-steps", 6, "--save-steps", 3, "--density", 0.03, "--teacher", teacher)
    words = command("squad", model, data, output, *narrow, *short)
    whole = main(words)
    assert whole["figures"]["masked"].keys() == {"exact_match", "f1"}
    assert whole["features"]["validation"] > 6, "contexts are longer than a feature"
    assert whole["published"]["source"] == "Sanh et al. 2020, Table 3"

    checkpoint = output / "checkpoints" / "checkpoint-6"
    names = ("model.safetensors", "pruning_scores.safetensors", "optimizer.pt")
    wanted = [(checkpoint / name).read_bytes() for name in names]
    shutil.rmtree(checkpoint)
    (output / "result.json").unlink()
    capsys.readouterr()
    resumed = main(words)
    expected = f"{output} holds this run; it goes on from checkpoint-3.\n"
    assert expected in capsys.readouterr().out
    assert [(checkpoint / name).read_bytes() for name in names] == wanted
    assert resumed["figures"] == whole["figures"]

    monkeypatch.setattr(pruning, "make_trainer", None)  # what is finished is not trained
    assert main(words)["figures"] == whole["figures"]
    with raises(
        f"{output} holds a run with seed=0, and this one has seed=1. "
        "Take another --output, or delete that folder."
    ):
        main([*words, "--seed", "1"])
