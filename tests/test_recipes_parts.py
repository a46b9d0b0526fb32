"""Settings, command line and data of the recipes, and what they refuse."""

# transformers annotates itself in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import doctest
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipes import settings as settings_module
from benchmarks.recipes.command import parse
from benchmarks.recipes.data import read
from benchmarks.recipes.published import METRICS, published
from benchmarks.recipes.run import TASKS
from benchmarks.recipes.settings import PAPER, Place, Plan, Settings, notice, plan
from tests.small_run import raises
from tests.test_recipes import offline, pairs, questions, write_files

__all__ = ["offline"]  # a fixture for all tests here too
MNLI, QQP, SQUAD = TASKS["mnli"], TASKS["qqp"], TASKS["squad"]


@pytest.mark.parametrize(
    ("task", "total_steps", "warmup_steps", "cooldown_steps"),
    [("squad", 55330, 5400, 10800), ("mnli", 73632, 12000, 24000), ("qqp", 68226, 11000, 22000)],
)
def test_a_whole_run_has_the_steps_of_the_paper(
    task: str, total_steps: int, warmup_steps: int, cooldown_steps: int
) -> None:
    settings = Settings.of(task)
    found = plan(settings, PAPER[task].features)
    assert found == Plan(total_steps, warmup_steps, cooldown_steps)
    assert notice(settings, found) is None
    other_tokenizer = plan(settings, round(1.02 * PAPER[task].features))
    assert other_tokenizer == replace(found, total_steps=other_tokenizer.total_steps)


def test_shorter_runs_keep_the_parts() -> None:
    assert doctest.testmod(settings_module).attempted == 2
    assert plan(Settings.of("mnli", max_steps=7363), 10) == Plan(7363, 1199, 2399)
    for steps in range(1, 30):
        found = plan(Settings.of("squad", max_steps=steps), 10)
        assert found.warmup_steps + found.cooldown_steps < found.total_steps == steps
        Settings.of("squad").config(found).schedule.check(steps)


def test_settings_of_the_paper_and_others() -> None:
    assert Settings.of("squad").score_lr == 0.01
    assert Settings.of("squad", criterion="l0").score_lr == 0.1
    assert Settings.of("squad", criterion="l0", score_lr=0.5, seed=None).score_lr == 0.5
    config = Settings.of("mnli", granularity="32x16", score_init=0.5).config(Plan(9, 1, 2))
    assert config.granularity == (32, 16) and config.score_init == 0.5
    assert config.schedule.to_dict()["warmup"] == 1 and config.schedule.to_dict()["cooldown"] == 2
    second = Settings.of("mnli", criterion="second_order").config(Plan(90, 1, 2))
    assert second.schedule.to_dict()["cuts"] == 20


def test_published_figures() -> None:
    def found(task: str, **given: Any) -> Any:
        return published(Settings.of(task, **{"density": 0.1, **given}))

    table_2 = "Sanh et al. 2020, Table 2"
    assert found("squad") == {"exact_match": 71.9, "f1": 81.7, "source": table_2}
    assert found("qqp", criterion="magnitude", density=0.03)["f1"] == 58.4
    assert found("qqp", criterion="soft_movement", teacher="t")["accuracy"] == 90.5
    assert found("squad", density=0.15) is None and found("squad", criterion="platon") is None
    assert found("squad", granularity="head") is None and found("squad", scope="global") is None
    assert set(METRICS) == set(PAPER) == set(TASKS)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command line."""
    with pytest.raises(SystemExit):
        parse([*words, "--output", "out", "--device", "cpu"])
    return capsys.readouterr().err.splitlines()[-1].removeprefix("python -m benchmarks.recipes: ")


def test_command_lines_that_cannot_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "mnli", "--precision", "fp16") == (
        "error: --precision fp16 needs a GPU, and the run is on the CPU. Use bf16 or fp32."
    )
    assert said(capsys, "mnli", "--density", "1.5").startswith(
        "error: density must be above 0 and at most 1: "
    )
    assert said(capsys, "mnli", "--doc-stride", "8") == (
        "error: --doc-stride is for squad; the inputs of mnli are single ones."
    )
    assert said(capsys, "squad", "--max-length", "100") == (
        "error: --doc-stride 128 must be below --max-length 100."
    )
    assert said(capsys, "qqp", "--max-steps", "0") == (
        "error: argument --max-steps: invalid positive value: '0'"
    )
    assert said(capsys, "qqp", "--max-steps", "3", "--epochs", "1") == (
        "error: argument --epochs: not allowed with argument --max-steps"
    )
    settings, place = parse(["qqp", "--output", "out", "--device", "cpu", "--score-init", "0.5"])
    assert settings == Settings.of("qqp", score_init=0.5)
    assert place == Place(Path("out"), "cpu", 2000)


def test_missing_files_are_named(tmp_path: Path) -> None:
    data = write_files(tmp_path / "data", "csv", ("train",), pairs("mnli", 3))
    with raises(
        f"{data} has no file of the split validation_matched; found train.csv. The task mnli needs "
        "one file each of train, validation_matched, validation_mismatched, as .parquet, .json, "
        ".jsonl, .csv, such as validation_matched.parquet. Put them there, or leave --data out to "
        "read nyu-mll/glue from the hub.",
        FileNotFoundError,
    ):
        read(MNLI, data)
    with pytest.raises(FileNotFoundError, match=re.escape("of the split train; found nothing. ")):
        read(SQUAD, str(tmp_path / "nowhere"))
    (tmp_path / "data" / "train.json").write_text("{}")
    with raises(
        f"{data} has several files of the split train: train.csv, train.json. Leave one there."
    ):
        read(MNLI, data)


def test_parts_of_a_split_are_read_together(tmp_path: Path) -> None:
    rows = pairs("qqp", 2)
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation")
    found = read(QQP, write_files(tmp_path / "data", "parquet", names, rows))
    assert found["train"].to_list() == [*rows, *rows] and found["validation"].to_list() == rows


def test_words_that_look_like_missing_values_are_words(tmp_path: Path) -> None:
    rows = [{**row, "question1": "NA"} for row in pairs("qqp", 2)]
    found = read(QQP, write_files(tmp_path / "data", "csv", ("train", "validation"), rows))
    assert set(found["train"]["question1"]) == {"NA"}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "qqp",
            {"question2": "renamed"},
            "{} has no column question2; found question1, renamed, label. The task qqp needs the "
            "columns question1, question2, label, as nyu-mll/glue has them.",
        ),
        (
            "qqp",
            {"label": -1},
            "{} has the labels -1. The task qqp has 0 (not_duplicate), 1 (duplicate); leave other "
            "rows out.",
        ),
        ("qqp", {"question1": None}, "row 0 of {} has None as question1, which must be text."),
        (
            "squad",
            {"answers": {"text": [], "answer_start": []}},
            "row 0 of {} has {{'text': [], 'answer_start': []}} as answers. The task squad needs "
            'one answer or more: {{"text": ["..."], "answer_start": [0]}}, where each starts at '
            "this character of the context.",
        ),
    ],
)
def test_columns_that_do_not_fit(task: str, change: Any, message: str, tmp_path: Path) -> None:
    rows = pairs("qqp", 2) if task == "qqp" else questions()
    (name, value), *_ = change.items()
    if value == "renamed":
        rows = [{value if key == name else key: row[key] for key in row} for row in rows]
    else:
        rows = [{**row, name: value} for row in rows]
    data = write_files(tmp_path / "data", "jsonl", ("train", "validation"), rows)
    with raises(message.format(f"{data}/train.jsonl")):
        read(TASKS[task], data)
