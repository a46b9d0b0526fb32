"""PruningCallback: moves the masks of a model while any transformers Trainer trains it.

Imports transformers, so nothing but `mvpfx.hf` imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import (
    ExportableState,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from mvpfx.careless import has_ended
from mvpfx.manifest import Manifest, write_manifest
from mvpfx.mask import Mask
from mvpfx.penalty import penalty
from mvpfx.ranking import leading
from mvpfx.saved_config import save_config
from mvpfx.scheduler import SparsityScheduler, masks_of


class PruningCallback(TrainerCallback, ExportableState):
    """The schedule, the density in the logs and the state in checkpoints, for your own Trainer.

    The model must be prepared before the Trainer is made, and the optimizer must know the scores:
    override `create_optimizer` to return
    `mvpfx.hf.separate_scores(super().create_optimizer(), self.model)`. Where the criterion has a
    penalty, `compute_loss` must add `mvpfx.penalty(model)`. `PruningTrainer` does all of it.

    The masks are where the schedule has them after `state.global_step` of `state.max_steps` steps,
    so warm-up fractions relate to the steps that the Trainer takes. Once a run has brought them to
    the end of the schedule, they stay at that density in a further one. A checkpoint has the step
    in `trainer_state.json`, the configuration in `pruning_config.json`, and a manifest of its
    files.

    Attributes:
        scheduler: of the run; None before the first.
        schedule: its state, as it is saved.
        bars: progress bars that show the density.
        seals: whether configuration and manifest are its business, not the Trainer's.
        measured: the density that was counted last.
    """

    def __init__(self) -> None:
        self.scheduler: SparsityScheduler | None = None
        self.schedule: dict[str, int] | None = None
        self.bars: list[ProgressCallback] = []
        self.seals = True
        self.measured: float | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds of this callback."""
        if self.scheduler is not None:
            self.schedule = self.scheduler.state_dict()
        return {"args": {}, "attributes": {"schedule": self.schedule}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the masks where the schedule starts, or where the checkpoint left them."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        check_groups(model, optimizer.param_groups)
        saved = _saved_schedule(self, state) if state.global_step else None
        if saved is not None:
            scheduler = SparsityScheduler(model, state.max_steps, keep=bool(saved.get("keep")))
            scheduler.load_state_dict(saved)
        else:
            keep = True if has_ended(leading(masks_of(model))) else None
            scheduler = SparsityScheduler(model, state.max_steps, keep=keep)
        self.scheduler = scheduler
        self.measured = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the masks, after every optimizer step."""
        assert self.scheduler is not None, "training began"
        self.scheduler.step()
        shown = self.scheduler.density
        shown = self.measured if shown is None else shown
        for bar in self.bars:
            if shown is not None and bar.training_bar is not None:
                bar.training_bar.set_postfix(density=f"{shown:.4g}", refresh=False)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the density to what is logged, for callbacks that come later and for the history."""
        logs = kwargs.get("logs")
        if logs is not None and "density" not in logs:
            logs |= self.figures(kwargs["model"])
            if state.log_history:
                state.log_history[-1] |= {n: logs[n] for n in ("density", "penalty") if n in logs}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put configuration and manifest into a checkpoint that another Trainer has written."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.seals and args.should_save and folder.is_dir():
            self.seal(folder, kwargs["model"], state.global_step, "callback")

    def seal(
        self,
        folder: Path,
        model: nn.Module,
        step: int,
        writer: str,
        patterns: Sequence[str] = ("**/*",),
    ) -> None:
        """Write configuration and manifest into a folder, for the files that match a pattern."""
        save_config(model, folder)
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        write_manifest(folder, Manifest(writer, step, schedule), patterns)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What to log: the density counted over all sites, and the penalty where there is one."""
        masks = masks_of(model)
        self.measured = density(leading(masks))
        found = {} if self.measured is None else {"density": self.measured}
        if any(mask.criterion.penalised for mask in masks):
            with torch.no_grad():
                found["penalty"] = float(penalty(model))
        return found


def density(masks: Iterable[Mask]) -> float | None:
    """Fraction of all units that are kept now, counted; None without masks."""
    counts = [(mask.kept().sum(), mask.units) for mask in masks]
    units = sum(count for _, count in counts)
    return sum(int(kept) for kept, _ in counts) / units if units else None


def separate_scores(
    optimizer: torch.optim.Optimizer, model: nn.Module, score_lr: float = 1e-2
) -> torch.optim.Optimizer:
    """Give the scores a parameter group of their own: their own learning rate, no weight decay.

    Call it before the learning-rate scheduler is made, which treats all groups alike. The other
    groups stay as they are.

    Args:
        optimizer: over the parameters of `model`, new.
        model: prepared.
        score_lr: learning rate of the scores; 1e-2 in Sanh et al. 2020.

    Returns:
        `optimizer` itself.

    Raises:
        ValueError: it has taken steps already.
    """
    if any(_has_stepped(state) for state in optimizer.state.values()):
        raise ValueError(
            "the optimizer has taken steps already, and its state belongs to its groups. "
            "Call separate_scores right after the optimizer is made."
        )
    scores = {id(p): p for mask in masks_of(model) for p in mask.rated()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in scores]
    if scores:
        group = {"params": list(scores.values()), "lr": score_lr, "weight_decay": 0.0}
        optimizer.add_param_group(group)
    return optimizer


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is that after a step: Adagrad has some before the first."""
    return float(state["step"]) > 0 if "step" in state else bool(state)


def check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Make sure that an optimizer learns the scores of `model`, by themselves and undecayed.

    Raises:
        ValueError: if not; the text names the first site.
    """
    holder = {id(p): group for group in groups for p in group["params"]}
    remedy = (
        "Make it with torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...)), or return "
        "mvpfx.hf.separate_scores(super().create_optimizer(), self.model) from create_optimizer of "
        "your Trainer."
    )
    masks = masks_of(model)
    own = {id(p) for mask in masks for p in mask.parameters()}
    for mask in masks:
        for scores in mask.rated():
            group = holder.get(id(scores))
            if group is None:
                raise ValueError(
                    f"the optimizer does not have the scores of {mask.site.name}, so its mask "
                    f"would never move. {remedy}"
                )
            if group.get("weight_decay") or any(id(p) not in own for p in group["params"]):
                raise ValueError(
                    f"the scores of {mask.site.name} share their parameter group with weights, or "
                    f"decay: they need a learning rate of their own and no weight decay. {remedy}"
                )


def _saved_schedule(callback: PruningCallback, state: TrainerState) -> dict[str, Any]:
    saved: Any = state.stateful_callbacks or {}
    entry = saved.get(type(callback).__name__) or {}
    entry = entry[0] if isinstance(entry, list) else entry
    schedule = entry.get("attributes", {}).get("schedule")
    if schedule is None:
        raise ValueError(
            f"the checkpoint of step {state.global_step} was saved without "
            f"{type(callback).__name__}, so scores and schedule of the run are not in it. Resume "
            "from a checkpoint that was saved with it."
        )
    return schedule
