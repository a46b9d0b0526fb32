"""Small masked weights for the tests of the nouns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvpfx.granularity import parse
from mvpfx.mask import Mask
from mvpfx.ranking import rank_together
from mvpfx.rule import Rule
from mvpfx.schedule import CubicSchedule, Schedule
from mvpfx.site import Site

NOW = CubicSchedule(warmup=0, cooldown=0)


def raises(error: type[Exception], message: str) -> pytest.RaisesExc[Exception]:
    """Expect an error with exactly this message."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def rule(granularity: object = "element", **fields: Any) -> Rule:
    return Rule(granularity=parse(granularity), **fields)


def values(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def make_mask(
    weight: Tensor,
    granularity: object = "element",
    out_dim: int = 0,
    name: str = "ffn",
    **fields: Any,
) -> tuple[Mask, nn.Parameter]:
    """A mask at full density, and its weight."""
    parameter = nn.Parameter(weight.clone())
    site = Site(f"{name}.weight", tuple(weight.shape), out_dim)
    return Mask(site, parameter, rule(granularity, **fields)), parameter


def sharded(value: object) -> bool:
    """In the place of `is_sharded`, without processes to shard over."""
    return True


class Stack(nn.Module):
    """Matrices one after the other, each read through its mask."""

    def __init__(self, *weights: Tensor, plan: Schedule = NOW, **fields: Any) -> None:
        super().__init__()
        made = [make_mask(w, name=f"stack.{i}", **fields) for i, w in enumerate(weights)]
        self.weights = nn.ParameterList([weight for _, weight in made])
        self.masks = nn.ModuleList([mask for mask, _ in made])
        for mask in self.mask_list:
            mask.plan = plan
        rank_together(self.mask_list)

    @property
    def mask_list(self) -> list[Mask]:
        return [mask for mask in self.masks if isinstance(mask, Mask)]

    def forward(self, x: Tensor) -> Tensor:
        for weight, mask in zip(self.weights, self.masks, strict=True):
            x = F.linear(x, mask(weight))
        return x
