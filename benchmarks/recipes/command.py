"""The command line of the recipes."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes.run import CONVERTED, RESULT, TASKS, run, summary
from benchmarks.recipes.settings import DENSITY, MODEL, Place, Plan, Settings
from mvpfx import criteria

DESCRIPTION = """Prune BERT-base on a task, with the hyper-parameters of Sanh et al. 2020.

    python -m benchmarks.recipes mnli --density 0.15 --output runs/mnli
    python -m benchmarks.recipes squad --criterion soft_movement --output runs/squad --teacher NAME

Data and model come from the hub, or with --data and --model from folders. The same command takes a
run that was stopped up again. docs/recipes.md says what comes out."""


def parse(arguments: list[str] | None = None) -> tuple[Settings, Place]:
    """Read the command line: what the run does, and where."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--output", type=Path, required=True, help="folder for all that comes out")
    parser.add_argument("--data", help="folder with a file of each split, instead of the hub")
    parser.add_argument("--model", help=f"name on the hub, or folder ({MODEL})")
    parser.add_argument("--teacher", help="name or folder of a model to be distilled from")
    add_pruning(parser)
    add_training(parser)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in (field.name for field in fields(Settings))}
    settings = Settings.of(given.pop("task"), **given)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.precision == "fp16" and device == "cpu":
        parser.error("--precision fp16 needs a GPU, and the run is on the CPU. Use bf16 or fp32.")
    if options.doc_stride and not settings.paper.doc_stride:
        parser.error(f"--doc-stride is for squad; the inputs of {settings.task} are single ones.")
    if settings.doc_stride and settings.doc_stride >= settings.max_length:
        parser.error(
            f"--doc-stride {settings.doc_stride} must be below --max-length {settings.max_length}."
        )
    try:
        settings.config(Plan(settings.max_steps or 1, 0, 0))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return settings, Place(options.output, device, options.save_steps)


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Options of what is pruned, and how."""
    group = parser.add_argument_group("pruning")
    group.add_argument("--criterion", help=f"{', '.join(criteria.names())} (movement)")
    group.add_argument("--density", type=float, help=f"final fraction kept ({DENSITY})")
    group.add_argument("--granularity", help="element, row, column, head, 32x32, 2:4 (element)")
    group.add_argument("--scope", help="local or global (local)")
    group.add_argument("--score-init", type=number_or_name, help="zero, magnitude, a number (zero)")
    group.add_argument("--penalty-lambda", type=float, help="without it steered to the density")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Options of the training; those of the paper without them."""
    group = parser.add_argument_group("training, without these options that of the paper")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive)
    length.add_argument("--max-steps", type=positive, help="optimizer steps, instead of epochs")
    group.add_argument("--batch-size", type=positive)
    group.add_argument("--max-length", type=positive, help="tokens of an input")
    group.add_argument("--doc-stride", type=positive, help="tokens shared by parts of a context")
    group.add_argument("--lr", type=float)
    group.add_argument("--score-lr", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"))
    group.add_argument("--device", choices=("cuda", "cpu"), help="a GPU where there is one")
    group.add_argument("--save-steps", type=positive, default=2000, help="between checkpoints")


def positive(text: str) -> int:
    """A whole number above 0.

    Raises:
        ValueError: if it is none.
    """
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def number_or_name(text: str) -> str | float:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run from the command line; returns what is in the result file."""
    settings, place = parse(arguments)
    result = run(settings, place)
    print(f"\n{summary(result)}\n\n{place.output}: {RESULT}, {CONVERTED}, checkpoints")
    return result
