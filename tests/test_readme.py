"""README is true: its code runs, its commands are the checked ones, its figures are measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage_table, readme, results_file

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_quick_start_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 12
    exec(compile(code, "<quick start>", "exec"), {"__name__": "quick_start"})
    assert "encoder.layer.11.output.dense" in capsys.readouterr().out


def test_the_two_commands_pin_versions() -> None:
    commands = [block.strip() for block in blocks("bash")]
    assert commands == [
        'pip install -c constraints.txt -e ".[bench]" && python -m benchmarks.fine_prune',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_results_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.render(text, results_file.read_all()) == text, "run python -m benchmarks.readme"


@pytest.mark.parametrize("begin", [begin for begin, _ in readme.TABLES])
def test_each_table_stands_in_one_page(begin: str) -> None:
    found = [page.name for page in readme.PAGES if begin in page.read_text(encoding="utf-8")]
    assert len(found) == 1


def test_a_page_without_markers_is_refused() -> None:
    message = f"a page lacks the markers {readme.BEGIN!r} and {readme.END!r}. Put them back"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        readme.fill("# mvpfx\n", "")


def test_a_result_becomes_a_row() -> None:
    times = {"q1": 1.0, "median": 2.0, "q3": 3.0}
    result: dict[str, Any] = {
        "benchmark": "fine_prune",
        "workload": "toy",
        "settings": {"granularity": "element", "density": 0.1},
        "environment": {"threads": 1, "processor": "P", "instructions": "I", "torch": "2"},
        "test_accuracy": {"dense": 0.9, "masked": 0.8, "converted": 0.8},
        "largest_output_difference": 1.2e-6,
        "file_bytes": {"dense": 4_000_000, "converted": 1_000_000},
        "timed": "1 image",
        "latency_ms": {
            "dense": {**times, "median": 4.0},
            "converted": times,
            "converted_at_density_0.5": times,
        },
    }
    text = readme.table([json.loads(json.dumps(result))])
    assert text.splitlines()[2].replace(" ", "") == (
        "|toy|singleweights|10%|0.900|0.800|4.0→1.0|4.0→2.0|2.00x|2.00x|1e-06|"
    )
    assert text.splitlines()[-1] == (
        "toy: 1 image on 1 thread(s) of P (I), torch 2, medians of interleaved runs.  "
    )


def test_coverage_becomes_a_row_a_kind_and_a_line_a_miss() -> None:
    model: dict[str, Any] = {
        "name": "A",
        "group": "kind",
        "shapes": 4,
        "shapes_equal": 4,
        "largest_relative_difference": 1e-7,
        "regions": {"captured": 1, "total": 2},
        "sites": {"found": 3, "expected": 3},
        "misses": {"block.0": ["it reads data"]},
        "documented": {"a.b": "it is computed", "a.c": "it is computed"},
    }
    totals = {
        "models": 1,
        "shapes": 4,
        "shapes_equal": 4,
        "regions": {"captured": 1, "total": 2},
        "sites": {"found": 3, "expected": 3},
    }
    results = [{"benchmark": "coverage", "models": [model], "totals": totals}]
    lines = coverage_table.table(results).splitlines()
    assert [line.replace(" ", "") for line in lines[2:4]] == [
        "|kind|A|4/4|1e-07|1/2|3/3|",
        "|all|1|4/4||1/2|3/3|",
    ]
    assert lines[5:] == [
        "- A: 1 region not captured: it reads data.",
        "- A: no site: `a.b`, `a.c`: it is computed.",
    ]
    assert coverage_table.table([]) == "No result file yet."
