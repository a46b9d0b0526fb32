"""Models in pairs, to train side by side: one as it is, and a prepared copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.granularity import to_matrix
from mvpfx.mask import Mask
from mvpfx.region import region_of
from mvpfx.state import inner_model, state_of
from tests.zoo import ZOO
from tests.zoo.entry import Batch, loss, output

Pair = tuple[Any, Any, Batch]
KEPT = 1e-6
"""Largest difference that counts as equal, relative to the largest entry of a tensor."""


def whole(**fields: Any) -> mvpfx.PruningConfig:
    """A configuration whose masks are all ones."""
    return mvpfx.PruningConfig(density=1.0, schedule=mvpfx.ConstantSchedule(), **fields)


def half(**fields: Any) -> mvpfx.PruningConfig:
    """A configuration whose masks keep half from the first step on."""
    return mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule(), **fields)


def pair(name: str, change: Callable[[Any], Any] = lambda model: model) -> Pair:
    """A model of the zoo as it is, a prepared copy with all-ones masks, and a batch.

    `change` is made to the model before it is copied.
    """
    raw = ZOO[name].model()
    change(raw)
    return raw, mvpfx.prepare(copy.deepcopy(raw), whole()), ZOO[name].batch(0)


def masked_pair(name: str) -> Pair:
    """A model whose weights are zero where the masks of its prepared copy are; and a batch."""
    raw = ZOO[name].model()
    prepared = mvpfx.prepare(copy.deepcopy(raw), half())
    shuffle_scores(prepared)
    with torch.no_grad():
        for mask in masks_of(prepared):
            raw.get_parameter(mask.site.name).mul_(mask.mask())
    return raw, prepared, ZOO[name].batch(0)


def shuffle_scores(model: nn.Module) -> None:
    """Give each mask random scores."""
    generator = torch.Generator().manual_seed(1)
    for mask in masks_of(model):
        scores = mask.require_scores()
        with torch.no_grad():
            scores.copy_(torch.rand(scores.shape, generator=generator))


def masks_of(model: nn.Module) -> list[Mask]:
    """The masks of a prepared model."""
    return [module for module in model.modules() if isinstance(module, Mask)]


def step(model: Any, batch: Batch, seed: int = 3) -> Any:
    """One seeded forward and backward; the result of the forward."""
    torch.manual_seed(seed)
    result = model(**batch)
    loss(result).backward()
    return result


def assert_equal(found: Tensor | None, wanted: Tensor | None, what: str = "output") -> None:
    """Equal up to the rounding of another order of the same sums; no tensor equals none."""
    assert (found is None) == (wanted is None), what
    if found is None or wanted is None:
        return
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
    found, wanted = found.detach().double(), wanted.detach().double()
    scale = float(wanted.abs().max())
    difference = float((found - wanted).abs().max())
    assert difference <= KEPT * scale, f"{what}: {difference:.1e} of {scale:.1e}"


def assert_same_step(prepared: Any, raw: Any, batch: Batch) -> None:
    """One step of both gives equal outputs, losses and gradients."""
    found, wanted = step(prepared, batch), step(raw, batch)
    assert_equal(output(found), output(wanted))
    assert_equal(loss(found), loss(wanted), "loss")
    assert_same_gradients(prepared, raw)


def assert_same_gradients(prepared: Any, raw: Any) -> None:
    """Weights have the gradients of the model with multiplied weights, scores the movement."""
    masks = {mask.site.name: mask for mask in masks_of(prepared)}
    parameters = dict(prepared.named_parameters())
    for name, parameter in raw.named_parameters():
        wanted = parameter.grad
        if name in masks:
            mask = masks[name]
            weight = parameters[name].detach()
            site, movement = mask.site, None
            if wanted is not None:
                movement = to_matrix(wanted * weight, site.out_dim, site.parts)
            assert_equal(mask.require_scores().grad, movement, f"scores of {name}")
            wanted = None if wanted is None else wanted * mask.mask()
        assert_equal(parameters[name].grad, wanted, name)


def regions(model: nn.Module) -> list[Any]:
    """The regions of a prepared model."""
    found = [region_of(inner_model(model).get_submodule(n)) for n in state_of(model).regions]
    return [region for region in found if region is not None]


def reasons(model: nn.Module) -> set[str]:
    """Why calls of the model were not captured."""
    return {reason for region in regions(model) for reason in region.declined}
