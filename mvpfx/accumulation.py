"""Accumulation: scores that add up gradients themselves, and have no optimizer.

Sanh et al. 2020, Eq. 4: `S = -alpha * sum over steps of dL/dW' * W`. All that is needed is in the
gradient of the masked weight. While a scheduler watches, it is the gradient that the weight gets,
whole: it is summed over uses, batches and ranks, unscaled and clipped like any other. Just before
the optimizer steps, the scores take their part of it, and the mask is put on what the weight keeps.
So there is no gradient of scores, and no moments of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer

from mvpfx.distributed import is_sharded
from mvpfx.straight_through import both_gradients
from mvpfx.training_kernels import library

if TYPE_CHECKING:
    from mvpfx.mask import Mask

_numbers = itertools.count(1)


def watch_gradients(watcher: object, masks: Sequence[Mask]) -> int:
    """Have the weights of `masks` get whole gradients as long as `watcher` lives, or until another
    one comes; the number that they know it by.
    """
    number = next(_numbers)
    for mask in masks:
        mask.watcher = number
    weakref.finalize(watcher, _let_go, [weakref.ref(mask) for mask in masks], number)
    return number


def _let_go(masks: Sequence[weakref.ref[Mask]], number: int) -> None:
    for reference in masks:
        mask = reference()
        if mask is not None and mask.watcher == number:
            mask.watcher = None


def check_accumulating(masks: Sequence[Mask], model: nn.Module) -> None:
    """Make sure that the gradient of each weight says all about its scores, and nothing else.

    Raises:
        ValueError: if a weight does not train, is sharded, or is also an embedding, whose lookups
            are not masked.
    """
    tables = {id(p) for m in model.modules() if _looks_up(m) for p in m.parameters(recurse=False)}
    for mask in masks:
        weight, name = mask.weight, mask.site.name
        instead = "Leave accumulate out of criterion_options there."
        if not weight.requires_grad:
            raise ValueError(
                f"{name} does not train, and scores that accumulate take their changes from its "
                f"gradient. {instead}"
            )
        if is_sharded(weight):
            raise ValueError(
                f"{name} is sharded over ranks, and scores accumulate by whole weights. {instead}"
            )
        if id(weight) in tables:
            raise ValueError(
                f"{name} is an embedding too, whose lookups are not masked, so its gradient does "
                f"not tell what the scores get. {instead}"
            )


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


@torch.no_grad()
def accumulate(masks: Sequence[Mask], optimizer: Optimizer) -> None:
    """Take the whole gradients apart that an optimizer holds.

    Args:
        masks: those that have scores; their followers come with them.
        optimizer: that is about to step.

    Raises:
        ValueError: it holds a weight, and not the scores, whose learning rate is needed.
    """
    groups = optimizer.param_groups
    rates: Mapping[int, float] = {id(p): g["lr"] for g in groups for p in g["params"]}
    families = [(mask, [mask, *cast("tuple[Mask, ...]", mask.followers)]) for mask in masks]
    held = [
        (mask, [(m, _mask_of(m)) for m in family if id(m.weight) in rates and _has_gradient(m)])
        for mask, family in families  # all masks first: scores of one decide on those of others
    ]
    for mask, members in held:
        if members and id(mask.require_scores()) not in rates:
            raise ValueError(
                f"the optimizer holds {mask.site.name} and not its scores, whose learning rate "
                f"{mask.rule.criterion} accumulates by. Make it with "
                "torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...))."
            )
    for mask, members in held:
        if not members:
            continue
        scores = mask.require_scores()
        rate = float(rates[id(scores)])
        if _in_one_pass(mask, members, rate):
            continue
        changes = [_taken(member, kept).view_as(scores) for member, kept in members]
        change = torch.stack(changes).sum(0) if len(changes) > 1 else changes[0]
        if mask.measuring:
            scores.add_(change.abs(), alpha=rate)
        else:
            scores.sub_(change, alpha=rate)


def _in_one_pass(mask: Mask, members: Sequence[tuple[Mask, Tensor | None]], rate: float) -> bool:
    """Whether the native library did all of it: for single weights that nobody shares."""
    if len(members) != 1 or mask.measuring or not mask.granularity.is_element:
        return False
    ((member, kept),), scores = members, mask.require_scores()
    gradient, weight = member.weight.grad, member.weight
    if gradient is None or kept is None or not library.serves(gradient, weight, kept, scores):
        return False
    library.take_movement(gradient, weight, kept, scores, rate)
    increment_version([gradient, scores])
    return True


def _has_gradient(mask: Mask) -> bool:
    return mask.weight.grad is not None


def _mask_of(mask: Mask) -> Tensor | None:
    """What the last forward kept; None where that was all."""
    full = mask.density is not None and mask.density >= 1
    return None if full else mask.mask().to(mask.weight.device)


def _taken(mask: Mask, kept: Tensor | None) -> Tensor:
    """What a weight's gradient says of its units, float32 `[r, c]`; leaves the masked gradient."""
    weight = mask.weight
    assert weight.grad is not None
    weight.grad, movement = both_gradients(weight.grad, weight, kept, mask.layout)
    return movement
