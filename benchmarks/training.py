"""Fine-tuning and evaluation as the benchmarks do them: AdamW, linear warm-up and decay."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mvpfx
from benchmarks.workloads import Batch, Split, batches


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    epochs: int
    batch_size: int
    lr: float
    score_lr: float
    seed: int
    warmup: float = 0.1  # fraction of the run
    precision: str = "fp32"  # or "bf16": forwards and backwards under autocast

    def total_steps(self, split: Split) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * len(list(range(0, len(split), self.batch_size)))


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """Bring a batch to where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Teacher:
    """A model whose outputs are targets beside the labels."""

    model: nn.Module
    distillation: mvpfx.Distillation


def fine_tune(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    label: str,
    scheduler: mvpfx.SparsityScheduler | None = None,
    teacher: Teacher | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> None:
    """Train `model` in place; with `scheduler`, move its masks a step after each update.

    With `teacher`, which is not trained, its outputs count too.
    """
    total_steps = recipe.total_steps(split)
    groups = mvpfx.parameter_groups(model, lr=recipe.lr, score_lr=recipe.score_lr)
    optimizer = torch.optim.AdamW(groups, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay(recipe, total_steps))
    shuffle = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    model.train()
    with tqdm(total=total_steps, desc=label, mininterval=1.0) as bar:
        for _ in range(recipe.epochs):
            for batch in batches(split, recipe.batch_size, shuffle):
                with autocast(model, recipe.precision):
                    loss = loss_of(model, to_device(batch, model), teacher)
                loss = loss + mvpfx.penalty(model)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                decay.step()
                if scheduler is not None:
                    scheduler.step()
                bar.update()
                bar.set_postfix_str(f"loss {loss.detach().item():.3f}", refresh=False)
            if after_epoch is not None:
                after_epoch()
                model.train()
    model.eval()


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """The context that forwards of a training step run in."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def loss_of(model: nn.Module, batch: Batch, teacher: Teacher | None) -> Tensor:
    """The loss on labels, with what a teacher adds to it."""
    if teacher is None:
        return model(**batch).loss
    how = teacher.distillation
    states = {"output_hidden_states": True} if how.hidden_weight else {}
    found: Any = model(**batch, **states)
    with torch.no_grad():
        taught = teacher.model(**batch, **states)
    added = mvpfx.distillation_loss(found, taught, how, attention_mask=batch.get("attention_mask"))
    return how.task_weight * found.loss + added


def warmup_and_decay(recipe: Recipe, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor of a step: rises linearly to 1, then falls linearly to 0."""
    warmup_steps = max(1, round(recipe.warmup * total_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return factor


@torch.no_grad()
def outputs(model: nn.Module, split: Split, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Logits `[examples, classes]` and labels `[examples]`, on the CPU, in one fixed order."""
    model.eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches(split, batch_size):
        result: Any = model(**to_device(batch, model))
        logits.append(result.logits.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of examples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()
