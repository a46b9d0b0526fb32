"""Which criterion keeps how much accuracy at which density, on small data.

    python -m benchmarks.accuracy --model FOLDER --data FOLDER --method platon --density 0.10
    python -m benchmarks.accuracy --model FOLDER --data FOLDER [--data FOLDER] --all

The first runs one cell, the second all cells of the study that are not in the result file yet:
every run is a line there, written when it ends, so a run that was stopped is taken up again.
Settings of a method are chosen on dev.tsv (`benchmarks.accuracy_table` does); test.tsv is only
reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import mvpfx
from benchmarks import presets, results_file, teachers, training
from benchmarks.teachers import CrossFitting
from benchmarks.training import Recipe, Teacher
from benchmarks.workloads import Split, Workload, sentences
from mvpfx import criteria

RESULT = results_file.FOLDER / "accuracy.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run; all of it goes into the result line, and is what tells runs apart."""

    task: str
    method: str
    density: float
    score_lr: float = 1e-2
    scope: str = "local"
    score_init: str | None = None  # the criterion's own
    penalty_lambda: float | None = None
    granularity: str = "element"
    teacher: bool = False
    epochs: int = 6
    batch_size: int = 32
    lr: float = 1e-4
    warmup: float = 0.1
    cooldown: float = 0.2
    freeze: bool = False
    precision: str = "bf16"
    seed: int = 0
    task_weight: float = 0.5
    temperature: float = 2.0
    hidden_weight: float = 0.0
    folds: int = 0  # of the teacher's cross-fitted answers; 0: the dense model of the same seed
    splits: int = 1

    def recipe(self) -> Recipe:
        """How it is trained."""
        return Recipe(
            self.epochs,
            self.batch_size,
            self.lr,
            self.score_lr,
            self.seed,
            precision=self.precision,
        )

    def config(self, model: nn.Module) -> mvpfx.PruningConfig:
        """How the model is prepared."""
        structured = presets.pruning_config(model, density=1.0, granularity=self.granularity)
        return replace(
            structured,
            criterion=self.method,
            density=self.density,
            scope=self.scope,
            score_init=self.score_init,
            penalty_lambda=self.penalty_lambda,
            schedule=mvpfx.CubicSchedule(
                self.warmup, self.cooldown, self.freeze, criteria.find(self.method).cuts
            ),
        )


DENSE = "dense"
DENSITIES = (0.10, 0.05, 0.03)
SCORE_LRS = (1e-2, 3e-2)


def study(task: str) -> Iterator[Cell]:
    """All cells of a task, the dense one first: distillation takes its model for a teacher."""
    yield Cell(task, DENSE, 1.0)
    for density in DENSITIES:
        for score_lr in SCORE_LRS:
            yield Cell(task, "movement", density, score_lr=score_lr)
            yield Cell(task, "soft_movement", density, score_lr=score_lr)
            yield Cell(task, "l0", density, score_lr=score_lr)
        for scope in ("local", "global"):
            yield Cell(task, "magnitude", density, scope=scope)
            yield Cell(task, "platon", density, scope=scope)
        yield Cell(task, "movement", density, scope="global")
        yield Cell(task, "saliency", density, scope="global")
        yield Cell(task, "second_order", density, scope="global")
    yield Cell(task, "random", 0.10)
    for score_init in ("magnitude", "zero"):
        yield Cell(task, "movement", 0.10, score_init=score_init)
    yield Cell(task, "movement", 0.10, teacher=True)
    for scope in ("local", "global"):
        yield Cell(task, "movement", 0.25, scope=scope, granularity="structured")
    yield Cell(task, "movement", 0.25, granularity="hybrid")


def run(cell: Cell, workload: Workload, teacher: Teacher | None) -> tuple[nn.Module, Any]:
    """Train one cell. Returns the model, and what came out."""
    model = copy.deepcopy(workload.model)
    recipe = cell.recipe()
    scheduler = None
    if cell.method != DENSE:
        mvpfx.prepare(model, cell.config(model))
        scheduler = mvpfx.SparsityScheduler(model, total_steps=recipe.total_steps(workload.train))
    by_epoch: list[tuple[float, float]] = []

    def after_epoch() -> None:
        assert workload.dev is not None
        by_epoch.append(score(model, workload.dev))

    start = time.perf_counter()
    label = f"{cell.task} {cell.method} {cell.density:g}"
    training.fine_tune(model, workload.train, recipe, label, scheduler, teacher, after_epoch)
    seconds = time.perf_counter() - start
    test, test_loss = score(model, workload.test)
    return model, {
        "dev": by_epoch[-1][0],
        "dev_loss": round(by_epoch[-1][1], 4),
        "test": test,
        "test_loss": round(test_loss, 4),
        "dev_by_epoch": [found for found, _ in by_epoch],
        "density": counted_density(model),
        "seconds": round(seconds, 1),
    }


def score(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode."""
    logits, labels = training.outputs(model, split)
    return training.accuracy(logits, labels), functional.cross_entropy(logits, labels).item()


def counted_density(model: nn.Module) -> float:
    """Fraction of the units of all masked weights that are kept; 1 without masks."""
    from mvpfx.scheduler import masks_of

    masks = masks_of(model)
    units = sum(mask.units for mask in masks)
    return sum(int(mask.kept().sum()) for mask in masks) / units if units else 1.0


def done(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a result file, by their cells."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {key(Cell(**line["cell"])): line for line in lines}


def key(cell: Cell) -> str:
    """A text that is the same for the same cell."""
    return json.dumps(asdict(cell), sort_keys=True)


def run_all(cells: list[Cell], options: argparse.Namespace) -> None:
    """Run the cells that have no line yet, and append their lines."""
    for cell in cells:
        if key(cell) in done(options.output):
            continue
        data = next(folder for folder in options.data if folder.name == cell.task)
        workload = workload_of(data, options, cell.seed)
        if workload.dev is None:
            raise SystemExit(f"{data} has no dev.tsv, on which settings are chosen")
        model, result = run(cell, workload, teacher_of(cell, workload, data, options))
        if cell.method == DENSE:
            saved = options.teachers / f"{cell.task}-{cell.seed}.pt"
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), saved)
        environment = results_file.environment(next(model.parameters()).device)
        line = {"cell": asdict(cell), **result, "environment": environment}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{cell}\n  dev {result['dev']:.4f}  test {result['test']:.4f}", flush=True)


def workload_of(data: Path, options: argparse.Namespace, seed: int) -> Workload:
    """The task, with the model where it is trained."""
    workload = sentences(options.model, data, seed=seed, max_tokens=64, limit=options.limit)
    workload.model.to(options.device)
    return workload


def teacher_of(
    cell: Cell, workload: Workload, data: Path, options: argparse.Namespace
) -> Teacher | None:
    """The dense model of the same task and seed, trained before; or cross-fitted answers."""
    if not cell.teacher:
        return None
    weights = (cell.temperature, cell.task_weight, 1 - cell.task_weight, cell.hidden_weight)
    distillation = mvpfx.Distillation(*weights)
    if cell.folds:
        fitting = CrossFitting(cell.folds, cell.splits, replace(cell.recipe(), seed=0))
        again = partial(workload_of, data, options)
        return Teacher(fitting.answers(again, options.teachers / cell.task), distillation)
    saved = options.teachers / f"{cell.task}-{cell.seed}.pt"
    if not saved.is_file():
        raise SystemExit(
            f"{cell.task}: no teacher {saved}, dense model of seed {cell.seed}: train it with "
            f"--method {DENSE} --seed {cell.seed}, or name its folder with --teachers"
        )
    return Teacher(teachers.dense(workload, saved), distillation)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained encoder")
    parser.add_argument("--data", type=Path, action="append", required=True, help="task folder")
    parser.add_argument("--all", action="store_true", help="all cells of the study")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--teachers", type=Path, default=Path("teachers"), help="dense models")
    parser.add_argument("--limit", type=int, help="use the first examples of each file only")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cpu")
    for field in fields(Cell)[1:]:
        flag = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kinds = {
                "float": float,
                "float | None": float,
                "int": int,
                "str": str,
                "str | None": str,
            }
            kind = kinds[str(field.type)]
            parser.add_argument(flag, type=kind)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # what Adam remembers of weights without gradients gets there
    tasks = [folder.name for folder in options.data]
    if options.all:
        cells = [cell for task in tasks for cell in study(task)]
    else:
        given = {field.name: getattr(options, field.name) for field in fields(Cell)[1:]}
        given = {name: value for name, value in given.items() if value is not None}
        if "method" not in given:
            raise SystemExit("say which cell: --method and --density, or --all")
        if given.get("folds") and not given["teacher"]:
            raise SystemExit("--folds is about what a teacher answers: add --teacher")
        given.setdefault("density", 1.0)
        cells = [Cell(task, **given) for task in tasks]
    run_all(cells, options)


if __name__ == "__main__":
    main()
