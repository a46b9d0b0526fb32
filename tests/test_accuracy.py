"""The accuracy study: cells run once, write a line each, and are taken up where they were left."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, accuracy_table, training
from benchmarks.teachers import Answers
from tests.test_benchmarks import tiny_encoder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    tiny_encoder(tmp_path / "model")
    (tmp_path / "toy").mkdir()
    lines = ["a bad film\t0", "a good film\t1"] * 8
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        (tmp_path / "toy" / name).write_text("\n".join(lines) + "\n")
    return {"--model": tmp_path / "model", "--data": tmp_path / "toy"}


def run(folders: dict[str, Path], *options: object) -> list[dict[str, Any]]:
    """Run the command; the lines of the result file."""
    output = folders["--model"].parent / "accuracy.jsonl"
    fixed = {**folders, "--output": output, "--teachers": output.parent / "teachers"}
    words = [str(word) for pair in fixed.items() for word in pair]
    accuracy.main([*words, *map(str, options)])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_cell_is_run_once(folders: dict[str, Path]) -> None:
    cell = ("--method", "platon", "--density", "0.25", "--epochs", "2", "--batch-size", "4")
    (line,) = run(folders, *cell)
    assert line["cell"]["method"] == "platon" and line["cell"]["task"] == "toy"
    assert len(line["dev_by_epoch"]) == 2 and line["dev"] == line["dev_by_epoch"][-1]
    assert line["density"] == pytest.approx(0.25, abs=1e-3)
    assert 0 <= line["test"] <= 1 and line["environment"]["device"] == "cpu"
    assert run(folders, *cell) == [line]
    assert len(run(folders, *cell, "--seed", "1")) == 2
    assert str(folders["--data"].parent) not in json.dumps(line)


def test_all_cells_of_a_study_with_a_teacher(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(task: str) -> list[accuracy.Cell]:
        dense = accuracy.Cell(task, accuracy.DENSE, 1.0, epochs=1, batch_size=4)
        taught = accuracy.Cell(task, "movement", 0.5, teacher=True, epochs=1, batch_size=4)
        return [dense, taught]

    monkeypatch.setattr(accuracy, "study", study)
    lines = run(folders, "--all")
    assert [line["cell"]["method"] for line in lines] == ["dense", "movement"]
    assert [line["density"] for line in lines] == pytest.approx([1.0, 0.5], abs=1e-3)
    assert run(folders, "--all") == lines


def test_the_cells_of_the_study_differ() -> None:
    cells = list(accuracy.study("sst2"))
    assert len({accuracy.key(cell) for cell in cells}) == len(cells)
    assert cells[0].method == accuracy.DENSE
    assert {cell.density for cell in cells} >= {1.0, 0.10, 0.05, 0.03}


def test_a_teacher_has_to_be_there(folders: dict[str, Path]) -> None:
    taught = ("--method", "movement", "--density", "0.5", "--teacher", "--seed", "3")
    with pytest.raises(SystemExit, match=r"toy-3\.pt.*--method dense --seed 3.*--teachers"):
        run(folders, *taught)
    assert not (folders["--model"].parent / "accuracy.jsonl").exists()


def test_cross_fitted_answers_are_of_models_that_had_not_seen_the_sentence(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{word}{' film' * count}" for word in ("bad", "good") for count in range(12)]
    lines = [f"{text}\t{int('good' in text)}" for text in (*texts, *texts[:5])]
    (folders["--data"] / "train.tsv").write_text("\n".join(lines) + "\n")
    seen: list[set[tuple[int, ...]]] = []
    whole = training.fine_tune

    def fine_tune(model: Any, split: Any, *rest: Any) -> None:
        seen.append({tuple(tokens) for tokens in split.tokens})
        whole(model, split, *rest)

    monkeypatch.setattr(training, "fine_tune", fine_tune)
    cell = ("--method", "movement", "--density", "0.5", "--epochs", "1", "--batch-size", "4")
    fitted = (*cell, "--teacher", "--folds", "3", "--splits", "2")
    (line,) = run(folders, *fitted)
    assert (line["cell"]["folds"], line["cell"]["splits"]) == (3, 2)
    *models, student = seen
    assert len(models) == 6 and len(student) == len(set(texts))
    for split in (models[:3], models[3:]):
        left = [student - part for part in split]
        assert all(left) and set.union(*left) == student  # each sentence in one fold
        assert sum(map(len, left)) == len(student)
    assert len(run(folders, *fitted, "--seed", "1")) == 2
    assert len(seen) == 8  # answers are kept


def test_folds_that_hold_nothing_are_an_error(folders: dict[str, Path]) -> None:
    cell = ("--method", "movement", "--density", "0.5", "--epochs", "1", "--teacher")
    message = r"fold \d of split 0 holds none of 2 sentences: take fewer than 9 folds"
    with pytest.raises(ValueError, match=message):
        run(folders, *cell, "--folds", "9")


def test_known_answers_are_found_whatever_the_padding() -> None:
    known = {(5, 6): torch.tensor([1.0, 0.0]), (7,): torch.tensor([0.0, 2.0])}
    ids, attention = torch.tensor([[7, 0], [5, 6]]), torch.tensor([[1, 0], [1, 1]])
    found: Any = Answers(known)(input_ids=ids, attention_mask=attention, labels=torch.zeros(2))
    assert found.logits.tolist() == [[0.0, 2.0], [1.0, 0.0]]


def test_what_to_run_has_to_be_said(folders: dict[str, Path]) -> None:
    with pytest.raises(SystemExit, match="say which cell"):
        run(folders)
    with pytest.raises(SystemExit, match="--folds is about what a teacher answers: add --teacher"):
        run(folders, "--method", "movement", "--density", "0.5", "--folds", "3")
    (folders["--data"] / "dev.tsv").unlink()
    with pytest.raises(SystemExit, match=r"has no dev\.tsv"):
        run(folders, "--method", "dense")


def line(method: str, density: float, dev: float, test: float, **cell: Any) -> dict[str, Any]:
    """One line of a result file."""
    made = accuracy.Cell("toy", method, density, **cell)
    return {"cell": asdict(made), "dev": dev, "test": test}


def test_the_table_shows_what_is_best_on_dev() -> None:
    lines = [
        line("dense", 1.0, 0.9, 0.88),
        line("movement", 0.10, 0.80, 0.85),
        line("movement", 0.10, 0.81, 0.83, scope="global"),
        line("movement", 0.10, 0.99, 0.97, teacher=True),
        line("movement", 0.25, 0.80, 0.86, granularity="structured"),
        line("movement", 0.25, 0.82, 0.85, granularity="structured", scope="global"),
        line("movement", 0.10, 0.99, 0.99, lr=1.0),
        line("platon", 0.03, 0.7, 0.71),
    ]
    text = accuracy_table.table(lines).splitlines()
    rows = [row.split("|")[1:-1] for row in text[2:5]]
    found = {row[0].strip(): [value.strip() for value in row[1:]] for row in rows}
    assert found["dense"][0] == "0.880"
    assert found["movement"] == ["0.830 / - / -", "79.3 / 76.1", "81.7 / 76.3", "89.1 / 85.6"]
    assert found["platon"] == ["- / - / 0.710", "", "", ""]
    other = [[value.strip() for value in row.split("|")[1:-1]] for row in text[-2:]]
    assert other == [
        ["toy", "movement", "10%", "single weights, distilled", "0.970", "0.880"],
        ["toy", "movement", "25%", "heads and FFN channels", "0.850", "0.880"],
    ]


def test_runs_of_one_setting_count_as_their_mean() -> None:
    lucky = line("movement", 0.05, 0.90, 0.70, scope="global")
    lines = [
        line("movement", 0.05, 0.80, 0.85, precision="bf16"),
        line("movement", 0.05, 0.92, 0.86, precision="fp32", seed=1),
        line("movement", 0.05, 0.90, 0.87, score_init="sensitivity", precision="fp32", seed=2),
        lucky,
        line("movement", 0.05, 0.60, 0.74, scope="global", seed=1),
    ]
    del lucky["cell"]["hidden_weight"]  # as in lines from before there was one
    text = accuracy_table.table(lines)
    assert "| movement    | - / 0.860 / - |" in text, "by mean dev, not by the best run"
    assert "bf16 and fp32, seeds [0, 1, 2]" in text
    last = [value.strip() for value in text.splitlines()[-1].split("|")[1:-1]]
    assert last == ["toy", "movement", "5%", "single weights", "3", "0.860", "0.850", "0.870"]


def test_a_setting_is_not_judged_by_seeds_that_others_lack() -> None:
    lines = [
        line("movement", 0.05, 0.90, 0.86),
        line("movement", 0.05, 0.70, 0.80, seed=1),
        line("movement", 0.05, 0.85, 0.87, scope="global"),
    ]
    assert "| movement    | - / 0.830 / - |" in accuracy_table.table(lines)
    lines.append(line("movement", 0.05, 0.95, 0.75, scope="global", seed=2))
    assert "| movement    | - / 0.830 / - |" in accuracy_table.table(lines)
    lines[0] = line("movement", 0.05, 0.90, 0.86, seed=3)  # none in common: all count
    assert "| movement    | - / 0.810 / - |" in accuracy_table.table(lines)


def test_first_scores_count_where_some_are_learned() -> None:
    def runs(method: str) -> int:
        named = [line(method, 0.05, 0.8, 0.8, score_init=init) for init in (None, "magnitude")]
        return len(accuracy_table.settings_of(named))

    assert runs("movement") == 2 and runs("magnitude") == 1 and runs("platon") == 1
