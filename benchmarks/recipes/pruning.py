"""Training with `PruningTrainer`: from the beginning, or on from the last checkpoint."""

# transformers annotates itself in part only.
# pyright: reportUnknownParameterType=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mvpfx
from benchmarks import results_file
from benchmarks.recipes.models import load_model, load_teacher
from benchmarks.recipes.settings import Place, Plan, Settings
from benchmarks.recipes.task import Task

CHECKPOINTS, SETTINGS = "checkpoints", "settings.json"


def train(
    task: Task, settings: Settings, plan: Plan, features: Any, tokenizer: Any, place: Place
) -> Path:
    """Train until the end of the run, wherever it was left.

    Args:
        task: whose model it is.
        settings: of the run.
        plan: its steps.
        features: of the train split.
        tokenizer: the model's.
        place: where it runs.

    Returns:
        The last checkpoint: the masked model, and all that a Trainer resumes from.
    """
    folder = place.output / CHECKPOINTS
    newest = mvpfx.latest_checkpoint(folder)
    claim(place.output, {**settings.recorded(), **asdict(plan)}, new=newest is None)
    if newest is None or step_of(newest) < plan.total_steps:
        if newest is not None:
            print(f"{place.output} holds this run; it goes on from {newest.name}.", flush=True)
        trainer = make_trainer(task, settings, plan, features, tokenizer, place)
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        newest = mvpfx.latest_checkpoint(folder)
    assert newest is not None, "a Trainer saves at the last step"
    return newest


def claim(output: Path, settings: dict[str, Any], new: bool) -> None:
    """Write down what the run in a folder is; of one that has checkpoints make sure it is the same.

    Raises:
        ValueError: it is another one.
    """
    path = output / SETTINGS
    if new or not path.is_file():
        results_file.write(path, settings)
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{output} holds a run with {name}={saved.get(name)!r}, and this one has "
                f"{name}={value!r}. Take another --output, or delete that folder."
            )


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that are behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def make_trainer(
    task: Task, settings: Settings, plan: Plan, features: Any, tokenizer: Any, place: Place
) -> mvpfx.hf.PruningTrainer:
    """The trainer of a run.

    Raises:
        ValueError: there are several devices or processes, or student and teacher do not fit.
    """
    from transformers import DataCollatorWithPadding, set_seed

    arguments = training_arguments(settings, plan, place)
    devices = max(arguments.n_gpu, 1) * arguments.world_size
    if devices > 1:
        raise ValueError(
            f"a recipe is for one device, and here are {devices}: batches would be {devices} times "
            "as large. Start it as one process, with CUDA_VISIBLE_DEVICES=0."
        )
    set_seed(settings.seed)
    model = load_model(task, settings)
    teacher = load_teacher(task, settings, model) if settings.teacher else None
    multiple = None if settings.precision == "fp32" else 8  # half precision is faster in eights
    return mvpfx.hf.PruningTrainer(
        model,
        arguments,
        DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
        train_dataset=features,
        processing_class=tokenizer,
        config=settings.config(plan),
        score_lr=settings.score_lr,
        teacher=teacher,
        distillation=None if teacher is None else mvpfx.Distillation(),
    )


def training_arguments(settings: Settings, plan: Plan, place: Place) -> Any:
    """The arguments of the Trainer, with the paper's hyper-parameters."""
    from transformers import TrainingArguments

    paper, on_cpu = settings.paper, place.device == "cpu"
    return TrainingArguments(
        str(place.output / CHECKPOINTS),
        max_steps=plan.total_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=plan.warmup_steps,
        max_grad_norm=paper.max_grad_norm,
        adam_epsilon=paper.adam_epsilon,
        weight_decay=paper.weight_decay,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        save_steps=place.save_steps,
        save_total_limit=2,
        logging_steps=100,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
