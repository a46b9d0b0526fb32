"""The models of a run: the one that is pruned, and its teacher."""

# transformers annotates itself in part only.
# pyright: reportUnknownParameterType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

import mvpfx
from benchmarks.recipes.settings import Settings
from benchmarks.recipes.task import Task


def load_model(task: Task, settings: Settings) -> nn.Module:
    """The pretrained model in float32, its embeddings frozen, as the authors did.

    Raises:
        ValueError: it is not built like BERT, or its inputs are shorter than the task's.
    """
    model, _ = load(task, settings.model)
    positions = getattr(model.config, "max_position_embeddings", settings.max_length)
    if positions < settings.max_length:
        raise ValueError(
            f"{settings.model} reads {positions} tokens, and the features of {task.name} have up "
            f"to {settings.max_length}. Take another model, or --max-length {positions}."
        )
    base = model.base_model
    embeddings = getattr(base, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"{type(base).__name__} has no module embeddings, which is to be frozen. "
            "The recipes are for BERT and models that are built like it."
        )
    embeddings.requires_grad_(False)
    return model


def load_teacher(task: Task, settings: Settings, model: Any) -> nn.Module:
    """The teacher in float32.

    Raises:
        ValueError: it was not fine-tuned on such a task, or does not fit the model.
    """
    name = str(settings.teacher)
    check_classes(task, name)
    teacher, missing = load(task, name)
    if missing:
        raise ValueError(
            f"the teacher {name} has no {sorted(missing)[0]}: it was not fine-tuned on "
            f"{task.name}. Take one that was."
        )
    sizes = {"model": model.config.vocab_size, "teacher": teacher.config.vocab_size}
    if sizes["model"] != sizes["teacher"]:
        raise ValueError(
            f"the teacher {name} has a vocabulary of {sizes['teacher']} tokens, and "
            f"{settings.model} one of {sizes['model']}. Take a teacher with the same tokenizer."
        )
    return teacher


def load_masked(task: Task, checkpoint: Path) -> nn.Module:
    """The masked model of a checkpoint, in float32 and eval mode, as it is scored."""
    config: Any = AutoConfig.from_pretrained(checkpoint)
    model: nn.Module = task.model_class.from_config(config, dtype=torch.float32)
    mvpfx.load_checkpoint(checkpoint, model)
    return model.eval()


def check_classes(task: Task, teacher: str) -> None:
    """Make sure that a teacher has the task's classes in the task's order, as far as it says so.

    Raises:
        ValueError: if it has others.
    """
    config: Any = AutoConfig.from_pretrained(teacher)
    found = [str(name).lower() for _, name in sorted(config.id2label.items())]
    wanted = list(task.classes)
    if not wanted or found == wanted:
        return
    if found != [f"label_{number}" for number in range(len(wanted))]:
        raise ValueError(
            f"the teacher {teacher} has the classes {', '.join(found)}, and {task.name} has "
            f"{', '.join(wanted)}, in this order. Take one that was fine-tuned with these."
        )
    print(
        f"The teacher does not name its classes. They are taken to be {', '.join(wanted)}, in this "
        "order.",
        flush=True,
    )


def load(task: Task, name: str) -> tuple[Any, set[str]]:
    """A model for a task from the hub or a folder; and what it has that was not found there."""
    options: dict[str, Any] = {}
    if task.classes:
        names = dict(enumerate(task.classes))
        options = {"id2label": names, "label2id": {name: key for key, name in names.items()}}
    model, info = task.model_class.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **options
    )
    return model, set(info["missing_keys"])
