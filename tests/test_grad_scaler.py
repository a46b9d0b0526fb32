"""Loss scaling: what criteria see of gradients is unscaled, and skipped steps are not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx

CASES: tuple[Mapping[str, Any], ...] = (
    {},
    {"criterion_options": {"accumulate": 1}},
    {"criterion": "saliency"},
    {"criterion": "platon"},
    {"criterion": "magnitude"},
    {"criterion": "soft_movement"},
)


def run(
    way: str, fused: bool, scale: float, fields: Mapping[str, Any], steps: int = 14
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    options: dict[str, Any] = {"density": 0.3, **fields}
    mvpfx.prepare(model, mvpfx.PruningConfig(**options))
    scheduler = mvpfx.SparsityScheduler(model, steps)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    x, y = torch.randn(64, 16), torch.randint(0, 2, (64,))
    for _ in range(steps):
        for part in range(2 if way == "accumulated" else 1):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x[part::2]).float(), y[part::2])
            loss = loss + mvpfx.penalty(model)
            scaler.scale(loss).backward()
        if way == "unscaled and clipped":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["plain", "unscaled and clipped", "accumulated"])
@pytest.mark.parametrize("scale", [64.0, 2.0**22], ids=["grows", "overflows at first"])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_fused_optimizers_train_as_others(
    fields: Mapping[str, Any], scale: float, way: str
) -> None:
    wanted, found = run(way, False, scale, fields), run(way, True, scale, fields)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_scores_do_not_depend_on_the_scale() -> None:
    fields = {"criterion_options": {"accumulate": 1}}
    small, large = (run("plain", True, scale, fields, 3) for scale in (1.0, 256.0))
    for name, value in small.items():
        torch.testing.assert_close(large[name], value, rtol=1e-2, atol=1e-4)
