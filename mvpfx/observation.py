"""Observation: criteria that accumulate the gradients of their scores see them at each step.

The scores of such criteria are parameters with a gradient, so whatever reduces, shards or unscales
gradients treats theirs like all others. Just before an optimizer that holds them steps, the
criterion takes the gradient and the optimizer finds none, so it leaves the scores alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from mvpfx.mask import Mask


def observe_steps(owner: object, masks: Sequence[Mask]) -> None:
    """Have the criteria of `masks` observe the steps of any optimizer, while `owner` lives."""
    observing = [weakref.ref(mask) for mask in masks if mask.criterion.observes]
    if not observing:
        return

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        alive = (reference() for reference in observing)
        _observe(optimizer, [mask for mask in alive if mask is not None])

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(owner, handle.remove)


@torch.no_grad()
def _observe(optimizer: Optimizer, masks: Sequence[Mask]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for mask in masks:
        scores = mask.source()
        if scores.grad is None:
            continue
        if id(scores) in held:
            gradient, scores.grad = scores.grad, None
            mask.criterion.observe(mask, gradient)
        elif id(mask.weight) in held:
            raise ValueError(
                f"the optimizer holds {mask.site.name} and not its scores, whose gradients "
                f"{mask.rule.criterion} accumulates. Make it with "
                "torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...))."
            )
