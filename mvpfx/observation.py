"""Observation: criteria that accumulate gradients see them at each optimizer step.

Where they are those of the scores, these are parameters with a gradient, so whatever reduces,
shards or unscales gradients treats theirs like all others. Just before an optimizer that holds them
steps, the criterion takes the gradient and the optimizer finds none, or zeros where the scores are
to be learned later, so it leaves them alone. Gradients of weights are looked at and left.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Watcher(Protocol):
    """What is told of optimizer steps."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before each step of each optimizer of this process."""
        ...


def watch_steps(watcher: Watcher) -> None:
    """Tell `watcher` of the steps of all optimizers, as long as it lives."""
    reference = weakref.ref(watcher)

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.before_step(optimizer)

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(watcher, handle.remove)


@torch.no_grad()
def unscaled(optimizer: Optimizer) -> bool:
    """Take a loss scale off the gradients of an optimizer that would do so itself while it steps.

    A `GradScaler` leaves this to fused optimizers: it hands them the scale, and whether any
    gradient is infinite, in which case they step without changing anything. All other optimizers
    have unscaled gradients, and are not called at all for such a step.

    Returns:
        Whether the step counts: False where the optimizer is going to skip it.
    """
    overflowed = getattr(optimizer, "found_inf", None)
    if overflowed is not None and bool(overflowed):
        return False
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        factor = torch.as_tensor(scale).double().reciprocal().float()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device))
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    return True


@torch.no_grad()
def observe(masks: Sequence[Mask], optimizer: Optimizer) -> None:
    """Have the criteria of masks see the gradients of the scores or weights an optimizer holds.

    Raises:
        ValueError: it holds a weight, and not the scores that have a gradient.
    """
    watching = [(mask, mask.criterion.watches(mask)) for mask in masks]
    watching = [(mask, watched) for mask, watched in watching if watched != "nothing"]
    if not watching:  # movement, once its first scores are there
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for mask, watched in watching:
        scores, weight = mask.source(), mask.weight
        if watched == "weight" and weight.grad is not None and id(weight) in held:
            mask.criterion.observe(mask, weight.grad)
        if watched != "scores" or scores.grad is None:
            continue
        if id(scores) in held:
            mask.criterion.observe(mask, scores.grad)
            if mask.criterion.observes == "scores":
                scores.grad = None
            else:
                scores.grad.zero_()  # they are learned later: the optimizer makes its state now
        elif id(weight) in held:
            raise ValueError(
                f"the optimizer holds {mask.site.name} and not its scores, whose gradients "
                f"{mask.rule.criterion} accumulates. Make it with "
                "torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...))."
            )
