"""README's table of accuracy by criterion and density, made from `results/accuracy.jsonl`.

Of several settings of a method (scope, learning rate of the scores) the one that is best on dev.tsv
is shown, with its accuracy on test.tsv: a mean over the runs of the setting, which differ in seed
and precision. On dev.tsv settings are compared by the seeds that all of them have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tabulate import tabulate

from benchmarks import accuracy, presets
from benchmarks.recipes.published import CRITERIA, TABLE_2
from mvpfx import criteria

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
ALIKE = ("epochs", "batch_size", "lr", "warmup", "cooldown", "freeze")
"""What the runs of the table have in common."""
_COLUMNS = ("MNLI", "SQuAD F1", "QQP")


@dataclass(frozen=True)
class Setting:
    """All runs of one cell of the study, whatever their seed and precision.

    Attributes:
        cell: of one of them.
        seeds, dev, test: of each, its seed and accuracies.
    """

    cell: Mapping[str, Any]
    seeds: tuple[int, ...]
    dev: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def shown(self) -> str:
        """Mean accuracy on the test set."""
        return f"{fmean(self.test):.3f}"

    def dev_of(self, seeds: Set[int]) -> float:
        """Mean accuracy on the dev set of the runs with these seeds; of all runs without any."""
        pairs = zip(self.seeds, self.dev, strict=True)
        return fmean(dev for seed, dev in pairs if seed in seeds or not seeds)


def settings_of(lines: Iterable[dict[str, Any]]) -> list[Setting]:
    """Runs by setting: those that differ in seed and precision alone are together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        cell = asdict(accuracy.Cell(**line["cell"]))  # older lines lack newer fields
        cell |= {"seed": None, "precision": None}
        cell["score_init"] = first_scores(cell["method"], cell["score_init"])
        groups.setdefault(tuple(sorted(cell.items())), []).append(line)
    return [
        Setting(
            group[0]["cell"],
            tuple(line["cell"]["seed"] for line in group),
            tuple(line["dev"] for line in group),
            tuple(line["test"] for line in group),
        )
        for group in groups.values()
    ]


def first_scores(method: str, score_init: str | None) -> str | None:
    """What the first scores were: the criterion's own where a run names none; None where none are
    learned.
    """
    criterion = None if method == accuracy.DENSE else criteria.find(method)
    if criterion is None or criterion.stored != "parameter":
        return None
    return score_init or criterion.score_inits[0]


def table(lines: list[dict[str, Any]]) -> str:
    """One row a criterion, one column a task and density; then the runs that are not alike."""
    lines = [line for line in lines if is_usual(line["cell"])]
    plain = [line for line in lines if is_plain(line["cell"])]
    if not plain:
        return "No result file yet."
    found = settings_of(lines)
    tasks = sorted({line["cell"]["task"] for line in plain})
    known = [name for name in PUBLISHED if any(line["cell"]["method"] == name for line in plain)]
    others = sorted({line["cell"]["method"] for line in plain} - set(PUBLISHED))
    rows = [row(method, found, tasks) for method in (*known, *others)]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{text}\n\n{about(plain)}{otherwise(found)}{repeated(found)}"


def is_usual(cell: dict[str, Any]) -> bool:
    """Whether a run was trained like the others."""
    usual = accuracy.Cell(cell["task"], cell["method"], cell["density"])
    return all(cell[name] == getattr(usual, name) for name in ALIKE)


def is_plain(cell: Mapping[str, Any]) -> bool:
    """Whether a run belongs into the first table: single weights, no teacher."""
    return cell["granularity"] == "element" and not cell["teacher"]


def otherwise(found: list[Setting]) -> str:
    """A table of the runs with a teacher or larger units, best on dev, beside dense ones."""
    rows = [
        [*title(each.cell), each.shown, best(accuracy.DENSE, found, each.cell["task"], 1.0)]
        for each in shown(found)
        if not is_plain(each.cell)
    ]
    return _below(rows, "accuracy", "dense")


def repeated(found: list[Setting]) -> str:
    """A table of the figures that are means: how many runs, and how far apart they are."""
    rows = [
        [
            *title(each.cell),
            len(each.test),
            each.shown,
            f"{min(each.test):.3f}",
            f"{max(each.test):.3f}",
        ]
        for each in shown(found)
        if len(each.test) > 1
    ]
    return _below(rows, "runs", "mean", "lowest", "highest")


def _below(rows: list[list[Any]], *headers: str) -> str:
    """A further table, whose rows begin with titles; nothing without rows."""
    names = ("task", "criterion", "remaining", "what is pruned", *headers)
    text = tabulate(rows, headers=names, tablefmt="github", disable_numparse=True)
    return f"\n\n{text}" if rows else ""


def title(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """Which figure of the tables a run belongs to."""
    unit = presets.WHAT[cell["granularity"]] if cell["method"] != accuracy.DENSE else "nothing"
    fitted = " cross-fitted" if cell.get("folds") else ""
    taught = f",{fitted} distilled" if cell["teacher"] else ""
    return cell["task"], cell["method"], f"{cell['density']:.0%}", unit + taught


def shown(found: list[Setting]) -> Iterator[Setting]:
    """Of each figure of the tables the setting that is best on dev, in order of their titles.

    Settings are compared by the seeds that all of them have: seeds differ by more than settings do.
    """
    ordered = sorted(found, key=lambda each: title(each.cell))
    for _, group in itertools.groupby(ordered, key=lambda each: title(each.cell)):
        rivals = list(group)
        seeds = frozenset.intersection(*(frozenset(each.seeds) for each in rivals))
        yield max(rivals, key=lambda each: each.dev_of(seeds))


def row(method: str, found: list[Setting], tasks: list[str]) -> dict[str, str]:
    """One criterion: own accuracies, then published ones."""
    cells = {"criterion": method}
    for task in tasks:
        densities = (1.0,) if method == accuracy.DENSE else accuracy.DENSITIES
        cells[task] = " / ".join(best(method, found, task, density) for density in densities)
    published = PUBLISHED.get(method, ("", "", ""))
    headers = [f"{name}, BERT-base, published" for name in _COLUMNS]
    return {**cells, **dict(zip(headers, published, strict=True))}


def best(method: str, found: list[Setting], task: str, density: float) -> str:
    """Test accuracy of the setting that is best on dev, single weights and no teacher; "-" without
    a run.
    """
    wanted = {"task": task, "method": method, "density": density}
    for each in shown([one for one in found if is_plain(one.cell)]):
        if wanted.items() <= each.cell.items():
            return each.shown
    return "-"


def about(lines: list[dict[str, Any]]) -> str:
    """What the runs have in common, and what not."""
    first = lines[0]["cell"]
    seeds = sorted({line["cell"]["seed"] for line in lines})
    precisions = " and ".join(sorted({line["cell"]["precision"] for line in lines}))
    shares = " / ".join(f"{density:.0%}" for density in accuracy.DENSITIES)
    return (
        f"Test accuracy at {shares} of the weights: MiniLM-L6, {first['epochs']} epochs of "
        f"batches of {first['batch_size']}, learning rate {first['lr']:g}, "
        f"{precisions}, seeds {seeds}: of one run, or the mean of those in the last table; of "
        "several scopes, first scores and score learning "
        "rates the one that is best on the dev set, by the seeds that all have. The last "
        "columns are those of another, larger model on other tasks, at 10 % / 3 % (Sanh et al. "
        "2020, Table 2)."
    )
