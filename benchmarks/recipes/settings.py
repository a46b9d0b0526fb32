"""What a run does: the authors' hyper-parameters of each task, and what was asked for instead."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mvpfx
from mvpfx import criteria

MODEL = "google-bert/bert-base-uncased"
DENSITY = mvpfx.PruningConfig().density
SAME_LENGTH = 0.05
"""Part by which runs may differ and count as equally long: SQuAD has a few more or fewer features
with another tokenizer.
"""


@dataclass(frozen=True)
class Hyperparameters:
    """Those of one task, from the commands that the authors published with their code.

    Attributes:
        features: training inputs, of which batches are made.
        epochs: passes over them.
        batch_size: of training.
        max_length: tokens of an input; what is longer is cut, or made into several features.
        warmup_steps: of the learning rates, and of the density, which stays at 1.
        cooldown_steps: at the final density.
        doc_stride: tokens that neighbouring features of one text share.
        lr: learning rate of the weights.
        max_grad_norm: which gradients are clipped to.
        adam_epsilon: of AdamW.
        weight_decay: of AdamW.
        threshold: final cutoff of soft movement.
    """

    features: int
    epochs: int
    batch_size: int
    max_length: int
    warmup_steps: int
    cooldown_steps: int
    doc_stride: int | None = None
    lr: float = 3e-5
    max_grad_norm: float = 1.0
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    threshold: float = 0.1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * math.ceil(self.features / self.batch_size)


PAPER = {
    "squad": Hyperparameters(88_524, 10, 16, 384, 5_400, 10_800, doc_stride=128),
    "mnli": Hyperparameters(392_702, 6, 32, 128, 12_000, 24_000),
    "qqp": Hyperparameters(363_846, 6, 32, 128, 11_000, 22_000),
}


def score_lr(criterion: str) -> float:
    """The authors' learning rate of the scores."""
    return 1e-1 if criterion == "l0" else 1e-2


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, but for the machine; `Settings.of` puts in the paper's values.

    Attributes:
        task: "squad", "mnli" or "qqp".
        model: name on the hub, or folder.
        data: folder, or None for the hub.
        criterion: as in `mvpfx.PruningConfig`, like those up to `penalty_lambda`.
        granularity: here as text; a block is "32x32".
        teacher: name or folder of a fine-tuned model, or None.
        max_steps: optimizer steps; None for whole epochs.
        precision: of training, "fp32", "bf16" or "fp16"; what is evaluated is float32.
    """

    task: str
    epochs: int
    batch_size: int
    max_length: int
    doc_stride: int | None
    lr: float
    score_lr: float
    model: str = MODEL
    data: str | None = None
    criterion: str = "movement"
    density: float = DENSITY
    granularity: str = "element"
    scope: str = "local"
    score_init: str | float = "zero"
    penalty_lambda: float | None = None
    teacher: str | None = None
    max_steps: int | None = None
    precision: str = "fp32"
    seed: int = 0

    @classmethod
    def of(cls, task: str, **given: Any) -> Settings:
        """The settings of a task: the paper's, and those that are given and not None."""
        given = {name: value for name, value in given.items() if value is not None}
        paper = PAPER[task]
        values: dict[str, Any] = {
            name: getattr(paper, name)
            for name in ("epochs", "batch_size", "max_length", "doc_stride", "lr")
        }
        values["score_lr"] = score_lr(given.get("criterion", cls.criterion))
        return cls(task, **{**values, **given})

    @property
    def paper(self) -> Hyperparameters:
        """The authors' hyper-parameters of the task."""
        return PAPER[self.task]

    def config(self, plan: Plan) -> mvpfx.PruningConfig:
        """How the model is prepared."""
        block = re.fullmatch(r"(\d+)x(\d+)", self.granularity)
        schedule = mvpfx.CubicSchedule(
            plan.warmup_steps, plan.cooldown_steps, cuts=criteria.find(self.criterion).cuts
        )
        return mvpfx.PruningConfig(
            criterion=self.criterion,
            density=self.density,
            granularity=(int(block[1]), int(block[2])) if block else self.granularity,
            scope=self.scope,
            score_init=self.score_init,
            penalty_lambda=self.penalty_lambda,
            threshold=self.paper.threshold,
            schedule=schedule,
        )

    def recorded(self) -> dict[str, Any]:
        """For a result file: folders by their names alone, the rest as it is."""
        values = asdict(self)
        for name in ("model", "data", "teacher"):
            value = values[name]
            if value is not None and Path(value).is_dir():
                values[name] = Path(value).resolve().name
        return values


@dataclass(frozen=True)
class Place:
    """Where a run is done.

    Attributes:
        output: folder for all that comes out.
        device: "cuda" or "cpu".
        save_steps: optimizer steps between two checkpoints.
    """

    output: Path
    device: str
    save_steps: int


@dataclass(frozen=True)
class Plan:
    """How long the parts of a run are, in optimizer steps."""

    total_steps: int
    warmup_steps: int
    cooldown_steps: int


def plan(settings: Settings, features: int) -> Plan:
    """The steps of a run over so many training features.

    One that is as long as the paper's has its warm-up and cool-down; in any other they are the same
    part of the run.

    >>> plan(Settings.of("mnli"), 392_702)
    Plan(total_steps=73632, warmup_steps=12000, cooldown_steps=24000)
    >>> plan(Settings.of("mnli", epochs=3), 392_702)
    Plan(total_steps=36816, warmup_steps=6000, cooldown_steps=12000)
    """
    paper = settings.paper
    total_steps = settings.max_steps
    if total_steps is None:
        total_steps = settings.epochs * math.ceil(features / settings.batch_size)
    part = total_steps / paper.total_steps
    if abs(part - 1) <= SAME_LENGTH:
        part = 1.0
    warmup_steps, cooldown_steps = int(part * paper.warmup_steps), int(part * paper.cooldown_steps)
    return Plan(total_steps, warmup_steps, cooldown_steps)


def notice(settings: Settings, planned: Plan) -> str | None:
    """What to tell of a run that is not as long as the paper's; None of one that is."""
    paper = settings.paper
    if planned.warmup_steps == paper.warmup_steps:
        return None
    return (
        f"The run has {planned.total_steps} optimizer steps and the paper's {paper.total_steps}: "
        f"warm-up and cool-down are {planned.warmup_steps} and {planned.cooldown_steps} steps "
        f"instead of {paper.warmup_steps} and {paper.cooldown_steps}."
    )
