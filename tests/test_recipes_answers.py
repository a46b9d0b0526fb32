"""Answers, figures and models of the recipes: what is computed by hand, and what is refused."""

# datasets, torchmetrics and transformers annotate themselves in part only.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import squad
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from benchmarks.recipes import answers, evaluation, models, pruning
from benchmarks.recipes.data import read
from benchmarks.recipes.run import TASKS
from benchmarks.recipes.settings import Place, Plan, Settings
from tests.small_run import raises
from tests.test_recipes import offline, pairs, questions, tiny_model, write_files

__all__ = ["offline"]  # a fixture for all tests here too
MNLI, QQP, SQUAD = TASKS["mnli"], TASKS["qqp"], TASKS["squad"]
STARTS, ENDS = np.array([-1, -1, -1, 0, 4, 8, -1]), np.array([-1, -1, -1, 3, 7, 11, -1])
"""[CLS] who [SEP] the cat sat [SEP]"""


def test_the_tokens_of_an_answer() -> None:
    assert answers.answer_tokens(STARTS, ENDS, 4, 11) == (4, 5), "cat sat"
    assert answers.answer_tokens(STARTS, ENDS, 5, 6) == (4, 4), "a part of a token"
    assert answers.answer_tokens(STARTS, ENDS, 8, 12) is None, "ends in the next feature"
    assert answers.answer_tokens(STARTS + 20 * (STARTS >= 0), ENDS + 20, 4, 11) is None, "before it"
    assert answers.answer_tokens(STARTS[:3], ENDS[:3], 0, 3) is None, "no context"


def logits(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def test_the_best_span_of_a_feature() -> None:
    start, end = logits(9, 9, 0, 1, 3, 2, 0), logits(9, 9, 0, 4, 1, 1, 9)
    assert answers.best_span(STARTS, ENDS, start, end) == (5.0, 0, 3), "the, not cat back to the"
    assert answers.best_span(STARTS, ENDS, start, logits(0, 0, 0, 4, 1, 5, 0)) == (8.0, 4, 11)
    padded = [np.append(values, np.float32(99)) for values in (start, end)]
    assert answers.best_span(STARTS, ENDS, *padded) == (5.0, 0, 3)
    assert answers.best_span(STARTS[:3], ENDS[:3], start, end) is None
    long = np.arange(40)
    only_ends = [np.eye(40)[0] * 50, np.eye(40)[39] * 50]
    found = answers.best_span(2 * long, 2 * long + 1, *only_ends)
    assert found is not None and found[2] - found[1] <= 2 * answers.MOST_TOKENS


def test_the_best_answer_of_several_features() -> None:
    low, high = logits(0, 0, 0, 1, 0, 0, 0), logits(0, 0, 0, 0, 0, 2, 0)
    texts = answers.best_answers(
        ["the cat sat", "the dog ran", ""],
        [0, 0, 1, 2],
        [STARTS, STARTS, STARTS, STARTS[:3]],
        [ENDS, ENDS, ENDS, ENDS[:3]],
        [low, high, low, low],
        [low, high, high, low],
    )
    assert texts == ["sat", "the dog ran", ""]


def test_features_overlap_and_their_labels_are_the_answers(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    data = write_files(tmp_path / "data", "jsonl", ("train", "validation"), questions())
    rows = read(SQUAD, data)["train"]
    trained = SQUAD.training_features(rows, tokenizer, 24, 8)
    scored = SQUAD.validation("validation", rows, tokenizer, 24, 8)
    assert trained["input_ids"][:] == scored.features["input_ids"][:]
    columns = {"input_ids", "token_type_ids", "attention_mask"}
    assert set(trained.column_names) == columns | {"start_positions", "end_positions"}
    first, second = (scored.features[i] for i in range(2))
    assert first["row"] == second["row"] == 0 and len(first["input_ids"]) == 24
    shared = {start for start in first["starts"] if start >= 0} & set(second["starts"])
    assert len(shared) == 8
    assert 0 in trained["start_positions"][:], "an answer is outside of some feature"

    def peaks(name: str) -> list[Any]:
        ids = zip(trained[name], trained["input_ids"], strict=True)
        return [np.eye(len(tokens))[place] for place, tokens in ids]

    outputs = {"start_logits": peaks("start_positions"), "end_logits": peaks("end_positions")}
    assert scored.score(outputs) == {"exact_match": 100.0, "f1": 100.0}


def test_figures_by_hand(tmp_path: Path) -> None:
    data = write_files(tmp_path / "data", "csv", ("train", "validation"), pairs("qqp", 2, 4))
    tiny_model(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = read(QQP, data)["validation"]
    validation = QQP.validation("validation", rows, tokenizer, 128, None)
    for labels, accuracy, f1 in (((1, 1, 0, 1), 75.0, 80.0), ((0, 0, 0, 0), 50.0, 0.0)):
        found = validation.score({"logits": [np.eye(2)[label] for label in labels]})
        assert found == {"accuracy": accuracy, "f1": f1}, "the labels are 0 1 0 1"


def test_answers_are_scored_as_by_the_official_script() -> None:
    def score(text: str, *references: str) -> tuple[float, float]:
        made = {"answers": {"text": list(references), "answer_start": [0]}, "id": "0"}
        found: Any = squad([{"id": "0", "prediction_text": text}], [made])
        return round(float(found["exact_match"]), 2), round(float(found["f1"]), 2)

    assert score("The  Cat!", "cat") == (100.0, 100.0), "articles, case, signs do not count"
    assert score("the cat sat", "a cat", "dog") == (0.0, 66.67), "2 * 1/2 * 1 / (1/2 + 1)"
    assert score("", "cat") == (0.0, 0.0)


def test_converted_models_have_to_be_as_good() -> None:
    evaluation.check_same({"f1": 80.0}, {"f1": 80.05})
    with raises(
        "the converted model has f1 79.80 and the masked one 80.00: they should agree to 0.1. "
        "Please report this; mvpfx.explain(converted) says what was done to it.",
        RuntimeError,
    ):
        evaluation.check_same({"f1": 80.0}, {"f1": 79.8})


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    short = tiny_model(tmp_path / "short", max_position_embeddings=64)
    with raises(
        f"{short} reads 64 tokens, and the features of mnli have up to 128. "
        "Take another model, or --max-length 64."
    ):
        models.load_model(MNLI, Settings.of("mnli", model=short))
    other = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
    GPT2ForSequenceClassification(other).save_pretrained(tmp_path / "other")
    with raises(
        "GPT2Model has no module embeddings, which is to be frozen. "
        "The recipes are for BERT and models that are built like it."
    ):
        models.load_model(QQP, Settings.of("qqp", model=str(tmp_path / "other")))


def test_a_recipe_is_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(n_gpu=2, world_size=1)
    monkeypatch.setattr(pruning, "training_arguments", lambda *_: arguments)
    place = Place(Path("out"), "cuda", 10)
    with raises(
        "a recipe is for one device, and here are 2: batches would be 2 times as large. "
        "Start it as one process, with CUDA_VISIBLE_DEVICES=0."
    ):
        pruning.make_trainer(QQP, Settings.of("qqp"), Plan(9, 1, 2), None, None, place)


def test_teachers_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tiny_model(tmp_path / "student")
    settings = Settings.of("mnli", model=student, teacher=str(tmp_path / "teacher"))
    model = models.load_model(MNLI, settings)

    def teacher(**values: Any) -> torch.nn.Module:
        tiny_model(tmp_path / "teacher", **values)
        return models.load_teacher(MNLI, settings, model)

    swapped = {0: "contradiction", 1: "neutral", 2: "entailment"}
    with raises(
        f"the teacher {settings.teacher} has the classes contradiction, neutral, entailment, and "
        "mnli has entailment, neutral, contradiction, in this order. Take one that was fine-tuned "
        "with these."
    ):
        teacher(classes=3, id2label=swapped)
    with raises(
        f"the teacher {settings.teacher} has a vocabulary of 30 tokens, and {student} one of 18. "
        "Take a teacher with the same tokenizer."
    ):
        teacher(classes=3, vocab_size=30)
    assert capsys.readouterr().out.endswith(
        "The teacher does not name its classes. They are taken to be entailment, neutral, "
        "contradiction, in this order.\n"
    )
    names = dict(enumerate(MNLI.classes))
    with raises(
        f"the teacher {settings.teacher} has no bert.pooler.dense.bias: it was not fine-tuned on "
        "mnli. Take one that was."
    ):
        teacher(id2label=names)
    assert not any(p.requires_grad for p in model.get_submodule("bert.embeddings").parameters())
    assert teacher(classes=3, id2label=names).get_parameter("classifier.weight").shape == (3, 32)
