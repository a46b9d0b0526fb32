"""SparsityScheduler: moves all masks of a model along their schedules, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from mvpfx.accumulation import accumulate, check_accumulating, watch_gradients
from mvpfx.adapters import warn_of_frozen_scores
from mvpfx.careless import Loop, come_to, undone
from mvpfx.checks import as_count
from mvpfx.cut import check_cuts, cut
from mvpfx.distributed import is_sharded
from mvpfx.mask import Mask
from mvpfx.observation import observe, unscaled, watch_steps
from mvpfx.ranking import leading, rank_together
from mvpfx.short_run import warn_of_short_run
from mvpfx.state import mark_optimizer_built
from mvpfx.steering import steerings
from mvpfx.swap import MASK_SUFFIX


class SparsityScheduler:
    """Takes every mask from where its schedule starts to where it ends.

    Like a learning-rate scheduler: make it after `prepare`, call `step` after each
    `optimizer.step()`, save its state dict with the optimizer's.

    Args:
        model: a prepared model, or a module that holds one.
        total_steps: length of the run, in optimizer steps. With gradient accumulation these are
            fewer than batches.
        keep: for a model that was pruned before. True leaves its masks at the density that they
            have come to, and lets them move within it; False starts its schedule anew, dense again
            where that starts so. Where it is None and no `load_state_dict` follows, the first
            `step` raises an error if the schedule would bring back what was pruned.

    Attributes:
        total_steps: as given.
        step_count: optimizer steps counted so far.

    Raises:
        TypeError: if `total_steps` is no whole number.
        ValueError: if it is below 1, if a schedule does not fit into it, if nothing is masked, or
            if weights that are to be rewound, or scores that are to be steered, are sharded; if
            scores are to accumulate the gradients of a weight that has none of its own.
    """

    def __init__(self, model: nn.Module, total_steps: int, *, keep: bool | None = None) -> None:
        self.total_steps = as_count(total_steps, "total_steps")
        self.step_count = 0
        self._masks = masks_of(model)
        self._leading = leading(self._masks)
        if not self._masks:
            raise ValueError(
                f"{type(model).__name__} has no masks to schedule. "
                "Call mvpfx.prepare(model) before SparsityScheduler(model, ...); where its matmuls "
                "are functional, with example_inputs=."
            )
        _check_rewinding(self._masks)
        _check_steering(self._masks)
        mark_optimizer_built(model)
        warn_of_frozen_scores(model, self._masks)
        accumulating = [mask for mask in self._masks if mask.accumulates]
        check_accumulating(accumulating, model)
        self._number = watch_gradients(self, accumulating)
        self._accumulating = leading(accumulating)
        rank_together(self._masks)
        self._observing = [
            m for m in self._leading if m.measures or m.criterion.observes != "nothing"
        ]
        self._keep = keep is True
        kept = self._keep
        self._cutting = [
            m for m in self._leading if not kept and (m.measures or m.criterion.cuts is not None)
        ]
        check_cuts(self._cutting, self.total_steps)
        warn_of_short_run([] if kept else self._leading, self.total_steps)
        self._steerings = [] if kept else steerings(self._leading, self.total_steps)
        self._loop = Loop(self._leading)
        if self._observing or self._steerings or self._accumulating:
            watch_steps(self)
        before = [come_to(mask) for mask in self._leading]
        self._move()
        self._undone = None if keep is not None else undone(before, self._leading)

    @property
    def density(self) -> float | None:
        """Target now: the fraction of units to keep, over all sites whose criterion has a target.

        None where no criterion has one (with a `penalty_lambda` soft movement keeps what passes its
        threshold).
        """
        asked = [
            (mask.steered if mask.density is None else mask.density, mask.units)
            for mask in self._leading
        ]
        known = [(density, count) for density, count in asked if density is not None]
        units = sum(count for _, count in known)
        return sum(density * count for density, count in known) / units if units else None

    def step(self) -> None:
        """Count one optimizer step, and move every mask to where its schedule has it then.

        Raises:
            ValueError: if all of `total_steps` are used up, or the schedule would bring back what
                an earlier run has pruned.
        """
        if self._undone is not None:
            raise ValueError(self._undone)
        if self.step_count >= self.total_steps:
            raise ValueError(
                f"step {self.step_count + 1} is past the end: the run has "
                f"total_steps={self.total_steps}. Call scheduler.step() once per optimizer step, "
                "not per batch, or build SparsityScheduler with as many total_steps as you take."
            )
        self.step_count += 1
        for mask in self._leading:
            mask.criterion.advance(mask)
        cut(self._cutting, self._move)
        if not self._keep:
            self._freeze()
            self._rewind()
        for steering in self._steerings:
            steering.move()
        self._loop.step()

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at gradients before an optimizer takes them; called by torch."""
        if not unscaled(optimizer):
            return
        accumulate([m for m in self._accumulating if m.watcher == self._number], optimizer)
        observe(self._observing, optimizer)
        for steering in self._steerings:
            steering.observe(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state dict; fit for JSON."""
        state: dict[str, Any] = {"step_count": self.step_count, "total_steps": self.total_steps}
        if self._keep:
            state["keep"] = True
        if self._steerings:
            state["steering"] = [steering.state_dict() for steering in self._steerings]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: step, densities, thresholds and penalties.

        Raises:
            TypeError: if a value is no whole number.
            ValueError: if `state` is of something else, or of a run of another length.
        """
        if "keep" in state and not self._keep:
            raise ValueError(
                "the saved run kept the density that its model had come to. Build "
                "SparsityScheduler(model, total_steps, keep=True) to resume it."
            )
        wanted = set(self.state_dict())
        if set(state) != wanted:
            found = ", ".join(sorted(state)) or "nothing"
            raise ValueError(
                f"a scheduler's state has {', '.join(sorted(wanted))}; found {found}. "
                "Pass what scheduler.state_dict() returned."
            )
        total_steps = as_count(state["total_steps"], "total_steps")
        if total_steps != self.total_steps:
            raise ValueError(
                f"the saved run has total_steps={total_steps}, this one {self.total_steps}. Build "
                f"SparsityScheduler(model, total_steps={total_steps}) to resume it."
            )
        step_count = as_count(state["step_count"], "step_count", least=0)
        if step_count > total_steps:
            raise ValueError(f"step_count {step_count} is past the end: total_steps={total_steps}.")
        self.step_count, self._undone = step_count, None
        if self._keep:
            return
        self._move()
        for mask in self._leading:
            mask.frozen = self._is_frozen(mask)
            mask.note_progress()
            mask.forget()
        for steering, saved in zip(self._steerings, state.get("steering", ()), strict=True):
            steering.load_state_dict(saved)

    def _is_frozen(self, mask: Mask) -> bool:
        plan = mask.plan
        return plan is not None and plan.frozen(self.step_count, self.total_steps)

    def _freeze(self) -> None:
        """Fix the masks whose schedule says so from this step on."""
        new = [mask for mask in self._leading if not mask.frozen and self._is_frozen(mask)]
        for mask, kept in [(mask, mask.kept().clone()) for mask in new]:
            mask.freeze(kept)

    def _rewind(self) -> None:
        for mask in self._masks:
            action = mask.plan.rewinds(self.step_count, self.total_steps) if mask.plan else None
            if action is not None:
                mask.rewind(action)

    def _move(self) -> None:
        for mask in () if self._keep else self._masks:
            mask.set_step(self.step_count, self.total_steps)


def _check_rewinding(masks: list[Mask]) -> None:
    """Make sure that weights which are to go back are whole."""
    for mask in masks:
        if mask.plan is not None and mask.plan.remembers and is_sharded(mask.weight):
            raise ValueError(
                f"{mask.site.name} is sharded over ranks, and rewind_to remembers whole weights. "
                "Use DDP, or leave rewind_to out."
            )


def _check_steering(masks: list[Mask]) -> None:
    """Make sure that scores which are to be steered are whole."""
    for mask in masks:
        if mask.steered is not None and mask.shard is not None:
            raise ValueError(
                f"the scores of {mask.site.name} are sharded over ranks, and a penalty is steered "
                "by whole scores. Use DDP, or prepare with a number as penalty_lambda."
            )


def masks_of(model: nn.Module) -> list[Mask]:
    """All masks in `model`, each once, in the order of its modules."""
    refresh_weights(model)
    return [module for module in model.modules() if isinstance(module, Mask)]


def refresh_weights(model: nn.Module) -> None:
    """Have each mask know the weight that is in the model now: it may have been replaced."""
    for module in model.modules():
        for name, child in module._modules.items():
            weight = module._parameters.get(name.removesuffix(MASK_SUFFIX))
            if isinstance(child, Mask) and weight is not None:
                child.hold(weight)
