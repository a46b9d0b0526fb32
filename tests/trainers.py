"""Trainers on tiny models of the zoo, and what their runs were."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import mvpfx
from tests.zoo import ZOO

logging.disable_progress_bar()
STEPS = 20
PRUNED = mvpfx.PruningConfig(density=0.2, schedule=mvpfx.CubicSchedule(0.1, 0.2))


def examples(name: str, count: int = 12) -> list[dict[str, Tensor]]:
    """The rows of some batches of the zoo; the same each time."""
    rows: list[dict[str, Tensor]] = []
    for index in range(count // 2):
        torch.manual_seed(1000 + index)
        batch = ZOO[name].make_batch(0)
        rows += [{key: value[row] for key, value in batch.items()} for row in range(2)]
    return rows


def still(model: nn.Module) -> nn.Module:
    """The model without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config: Any = model.config
    for field in ("attention_probs_dropout_prob", "attention_dropout", "dropout", "layerdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    for module in model.modules():
        for field in ("dropout", "attention_dropout", "dropout_prob", "activation_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model


def model(name: str, seed: int | None = None) -> nn.Module:
    """A model of the zoo; with a seed, one with other weights."""
    built = ZOO[name].model()
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    """Twenty steps on the CPU, three an epoch, with evaluation and a checkpoint every ten."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**values, **changed})


def pruning_trainer(
    name: str,
    folder: Path,
    seed: int | None = None,
    prepared: nn.Module | None = None,
    options: dict[str, Any] | None = None,
    **changed: Any,
) -> mvpfx.hf.PruningTrainer:
    """A PruningTrainer for a model of the zoo; `changed` are arguments of the run."""
    data = examples(name)
    chosen: dict[str, Any] = {"config": None if prepared else PRUNED, **(options or {})}
    return mvpfx.hf.PruningTrainer(
        prepared or model(name, seed),
        arguments(folder, **changed),
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        eval_dataset=data[:4],  # pyright: ignore[reportArgumentType]
        **chosen,
    )


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    """What was logged under a name: step -> value."""
    return {int(entry["step"]): entry[name] for entry in trainer.state.log_history if name in entry}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors under the same names, to the bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def of(trainer: Trainer) -> nn.Module:
    """The model of a trainer."""
    assert trainer.model is not None
    return trainer.model


def metrics(found: dict[str, float] | None) -> dict[str, float]:
    """The metrics of a prediction."""
    assert found is not None
    return found
