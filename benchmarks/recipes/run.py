"""A whole run: data, training, evaluation, conversion, and the files that come out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import mvpfx
from benchmarks import results_file
from benchmarks.accuracy import counted_density
from benchmarks.recipes import evaluation, pruning
from benchmarks.recipes.data import read
from benchmarks.recipes.models import load_masked
from benchmarks.recipes.published import published
from benchmarks.recipes.questions import SQUAD
from benchmarks.recipes.sentence_pairs import MNLI, QQP
from benchmarks.recipes.settings import Place, Plan, Settings, notice, plan
from benchmarks.recipes.task import Task, Validation

TASKS: dict[str, Task] = {task.name: task for task in (SQUAD, MNLI, QQP)}
RESULT, CONVERTED = "result.json", "converted.pt"
PACKAGES = ("accelerate", "datasets", "torchmetrics")


def run(settings: Settings, place: Place) -> dict[str, Any]:
    """Prune as the settings say, score and convert; returns what is in the result file.

    Args:
        settings: of the run.
        place: where it runs.
    """
    task = TASKS[settings.task]
    rows = read(task, settings.data)
    tokenizer = load_tokenizer(settings.model)
    widths = (tokenizer, settings.max_length, settings.doc_stride)
    features = task.training_features(rows["train"], *widths)
    validations = [task.validation(name, rows[name], *widths) for name in task.validations]
    planned = plan(settings, len(features))
    print(notice(settings, planned) or "The run is as long as the paper's.", flush=True)

    checkpoint = pruning.train(task, settings, planned, features, tokenizer, place)
    masked = load_masked(task, checkpoint).to(place.device)
    example = evaluation.example_inputs(validations[0], tokenizer)
    example = {name: tensor.to(place.device) for name, tensor in example.items()}
    converted = mvpfx.convert(masked, example_inputs=example)
    torch.save(converted, place.output / CONVERTED)

    figures = score_both(masked, converted, validations, tokenizer, settings.batch_size)
    result = {
        "benchmark": "recipes",
        "settings": settings.recorded(),
        "steps": describe_steps(planned, settings),
        "features": {
            "train": len(features),
            **{n: len(v.features) for n, v in zip(task.validations, validations, strict=True)},
        },
        "density": counted_density(masked),
        "figures": figures,
        "published": published(settings),
        "environment": environment(torch.device(place.device)),
        "table": mvpfx.sparsity_table(converted).splitlines(),
    }
    results_file.write(place.output / RESULT, result)
    return result


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: it cannot tell which characters a token stands for.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {model} cannot tell which characters a token stands for. "
            "Take a model whose tokenizer is a fast one, with a tokenizer.json."
        )
    return tokenizer


def score_both(
    masked: nn.Module,
    converted: nn.Module,
    validations: list[Validation],
    tokenizer: Any,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """The figures of both models, which have to agree."""
    figures = {
        name: evaluation.evaluate(model, validations, tokenizer, batch_size)
        for name, model in (("masked", masked), ("converted", converted))
    }
    evaluation.check_same(figures["masked"], figures["converted"])
    return figures


def describe_steps(planned: Plan, settings: Settings) -> dict[str, Any]:
    """The steps of a run, and how long the paper's is."""
    return {**asdict(planned), "paper_total_steps": settings.paper.total_steps}


def environment(device: torch.device) -> dict[str, Any]:
    """What the run was made with."""
    versions = {package: results_file.installed(package) for package in PACKAGES}
    return {**results_file.environment(device), **versions}


def summary(result: dict[str, Any]) -> str:
    """The figures of a result, for people."""
    lines = list(result["table"])
    found, paper = result["figures"]["converted"], result["published"] or {}
    for name, value in found.items():
        beside = f"; published: {paper[name]} ({paper['source']})" if name in paper else ""
        lines.append(f"{name} {value:.2f} %{beside}")
    return "\n".join([*lines, f"density {result['density']:.4f}"])
