"""README's table of accuracy by criterion and density, made from `results/accuracy.jsonl`.

Of several settings of a method (scope, learning rate of the scores) the one that is best on dev.tsv
is shown, with its accuracy on test.tsv.
"""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from benchmarks import accuracy, presets
from benchmarks.recipes.published import CRITERIA, TABLE_2

BEGIN = "<!-- accuracy: made by python -m benchmarks.readme -->"
END = "<!-- end of accuracy -->"
PUBLISHED = {
    accuracy.DENSE: ("84.5", "88.1", "91.4"),
    **{
        criterion: tuple(
            " / ".join(str(TABLE_2[task, density][i][metric]) for density in (0.10, 0.03))
            for task, metric in (("mnli", 0), ("squad", 1), ("qqp", 0))
        )
        for i, criterion in enumerate(CRITERIA)
    },
}
"""BERT-base at 10 % / 3 % of its weights: MNLI accuracy, SQuAD F1 and QQP accuracy on dev sets
(Sanh et al. 2020, Table 2).
"""
ALIKE = ("epochs", "batch_size", "lr", "warmup", "cooldown", "freeze", "precision")
"""What the runs of the table have in common."""
_COLUMNS = ("MNLI", "SQuAD F1", "QQP")


def table(lines: list[dict[str, Any]]) -> str:
    """One row a criterion, one column a task and density; then the runs that are not alike."""
    lines = [line for line in lines if is_usual(line["cell"])]
    plain = [line for line in lines if is_plain(line["cell"])]
    if not plain:
        return "No result file yet."
    tasks = sorted({line["cell"]["task"] for line in plain})
    known = [name for name in PUBLISHED if any(line["cell"]["method"] == name for line in plain)]
    others = sorted({line["cell"]["method"] for line in plain} - set(PUBLISHED))
    rows = [row(method, plain, tasks) for method in (*known, *others)]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{text}\n\n{settings(plain)}{otherwise(lines)}"


def is_usual(cell: dict[str, Any]) -> bool:
    """Whether a run was trained like the others."""
    usual = accuracy.Cell(cell["task"], cell["method"], cell["density"])
    return all(cell[name] == getattr(usual, name) for name in ALIKE)


def is_plain(cell: dict[str, Any]) -> bool:
    """Whether a run belongs into the first table: single weights, no teacher."""
    return cell["granularity"] == "element" and not cell["teacher"]


def otherwise(lines: list[dict[str, Any]]) -> str:
    """A table of the runs with a teacher or larger units, best on dev, beside dense ones."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in sorted((each for each in lines if not is_plain(each["cell"])), key=_dev):
        cell = line["cell"]
        unit = presets.WHAT[cell["granularity"]]
        taught = ", distilled" if cell["teacher"] else ""
        found[cell["task"], cell["method"], f"{cell['density']:.0%}", unit + taught] = line
    rows = [
        [*key, f"{line['test']:.3f}", best(accuracy.DENSE, lines, key[0], 1.0)]
        for key, line in sorted(found.items())
    ]
    headers = ["task", "criterion", "remaining", "what is pruned", "accuracy", "dense"]
    if not rows:
        return ""
    return "\n\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _dev(line: dict[str, Any]) -> float:
    return line["dev"]


def row(method: str, lines: list[dict[str, Any]], tasks: list[str]) -> dict[str, str]:
    """One criterion: own accuracies, then published ones."""
    found = {"criterion": method}
    for task in tasks:
        densities = (1.0,) if method == accuracy.DENSE else accuracy.DENSITIES
        found[task] = " / ".join(best(method, lines, task, density) for density in densities)
    published = PUBLISHED.get(method, ("", "", ""))
    headers = [f"{name}, BERT-base, published" for name in _COLUMNS]
    return {**found, **dict(zip(headers, published, strict=True))}


def best(method: str, lines: list[dict[str, Any]], task: str, density: float) -> str:
    """Test accuracy of the settings that are best on dev; "-" without a run."""
    wanted = {"task": task, "method": method, "density": density}
    found = [line for line in lines if wanted.items() <= line["cell"].items()]
    return f"{max(found, key=lambda line: line['dev'])['test']:.3f}" if found else "-"


def settings(lines: list[dict[str, Any]]) -> str:
    """What the runs have in common."""
    first = lines[0]["cell"]
    seeds = sorted({line["cell"]["seed"] for line in lines})
    shares = " / ".join(f"{density:.0%}" for density in accuracy.DENSITIES)
    return (
        f"Test accuracy at {shares} of the weights: MiniLM-L6, {first['epochs']} epochs of "
        f"batches of {first['batch_size']}, learning rate {first['lr']:g}, "
        f"{first['precision']}, seeds {seeds}; of several scopes, first scores and score learning "
        "rates the one that is best on the dev set. The last "
        "columns are those of another, larger model on other tasks, at 10 % / 3 % (Sanh et al. "
        "2020, Table 2)."
    )
