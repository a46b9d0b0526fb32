"""Budgets: a fraction of the parameters or FLOPs, and the density that keeps to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.flops import count_flops
from mvpfx.state import find_state, report_of
from tests.models import build
from tests.toy_masks import raises
from tests.training import masks_of

X = torch.ones(5, 8)
NOW: dict[str, Any] = {"schedule": mvpfx.ConstantSchedule(), "score_init": "magnitude"}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))


def kept(model: nn.Module) -> int:
    """Weights that masks keep, and all parameters that are not masked."""
    masks = masks_of(model)
    scores = sum(p.numel() for mask in masks for p in mask.parameters())
    everything = sum(p.numel() for p in model.parameters()) - scores
    return everything - sum(int((~mask.mask()).sum()) for mask in masks)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_parameters(name: str) -> None:
    model, _ = build(name)
    total = sum(p.numel() for p in model.parameters())
    mvpfx.prepare(model, mvpfx.PruningConfig(params=0.7, **NOW))
    assert kept(model) == pytest.approx(0.7 * total, abs=len(masks_of(model)))
    densities = {mask.rule.density for mask in masks_of(model)}
    assert len(densities) == 1


def test_flops() -> None:
    model, batch = build("bert")
    config = mvpfx.PruningConfig(flops=0.5, **NOW)
    mvpfx.prepare(model.eval(), config, example_inputs=batch)
    small = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    report = report_of(small)
    assert report.before is not None and report.after is not None
    assert report.before.flops and report.after.flops
    assert report.after.flops / report.before.flops == pytest.approx(0.5, abs=2e-3)


def test_flops_of_heads_and_channels() -> None:
    """What follows a head counts: its queries, keys, values and attention."""
    model, batch = build("distilbert")
    model.eval()
    heads_and_channels: dict[str, Any] = {
        "re:.*out_lin": {"granularity": "head"},
        "re:.*[qkv]_lin": None,
        "re:.*lin[12]": {"granularity": "channel"},
    }
    config = mvpfx.PruningConfig(flops=0.51, overrides=heads_and_channels, **NOW)
    mvpfx.prepare(model, config, example_inputs=batch)
    before = count_flops(build("distilbert")[0], batch).total
    after = count_flops(mvpfx.convert(model, example_inputs=batch, lowering="dense"), batch).total
    head_and_channel = 2 * 16 * 32 * 8 * 4 + 2 * 2 * (2 * 8 * 8 * 8) + 2 * 16 * 32 * 2
    assert abs(after - 0.51 * before) <= 2 * head_and_channel / 2  # half a unit a site and block


def test_a_site_with_a_density_of_its_own() -> None:
    model = mlp()
    config = mvpfx.PruningConfig(params=0.5, overrides={"0": {"density": 0.25}}, **NOW)
    mvpfx.prepare(model, config)
    masks = {mask.site.name: mask for mask in masks_of(model)}
    assert masks["0.weight"].rule.density == 0.25
    biases, total = 28, 28 + 8 * 24 + 24 * 4
    wanted = (0.5 * total - biases - 0.25 * 8 * 24) / (24 * 4)
    assert masks["2.weight"].rule.density == pytest.approx(wanted)
    assert kept(model) == pytest.approx(0.5 * total, abs=1)


def test_the_density_is_what_is_remembered() -> None:
    model = mvpfx.prepare(mlp(), mvpfx.PruningConfig(params=0.5, **NOW))
    state = find_state(model)
    assert state is not None and state.config is not None
    assert state.config.params is None and state.config.density == masks_of(model)[0].rule.density
    again = mvpfx.prepare(mlp(), state.config)
    assert masks_of(again)[0].rule == masks_of(model)[0].rule


def test_as_json() -> None:
    config = mvpfx.PruningConfig(flops=0.25)
    assert mvpfx.PruningConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": 0.0}, "params must be above 0 and at most 1; found 0.0."),
        ({"flops": 1.5}, "flops must be above 0 and at most 1; found 1.5."),
        (
            {"params": 0.5, "density": 0.3},
            "params=0.5 and density=0.3 both say how far to prune. Use one of params, flops and "
            "density, and no penalty_lambda with params or flops.",
        ),
        (
            {"params": 0.5, "flops": 0.3},
            "params=0.5 and flops=0.3 both say how far to prune. Use one of params, flops and "
            "density, and no penalty_lambda with params or flops.",
        ),
        (
            {"criterion": "soft_movement", "flops": 0.3, "penalty_lambda": 2.0},
            "flops=0.3 and penalty_lambda=2 both say how far to prune. Use one of params, flops "
            "and density, and no penalty_lambda with params or flops.",
        ),
    ],
)
def test_bad_budgets(fields: dict[str, Any], message: str) -> None:
    with raises(ValueError, message):
        mvpfx.PruningConfig(**fields)


def test_a_budget_that_cannot_be_kept() -> None:
    with raises(
        ValueError,
        "params=0.05 cannot be kept: what is not pruned, or has a density of its own, takes 0.0886 "
        "of the dense model's params. Needed: more than that. Ask for more, or prune more sites "
        "with overrides.",
    ):
        mvpfx.prepare(mlp(), mvpfx.PruningConfig(params=0.05))


def test_units_of_different_cost_in_one_pool() -> None:
    with raises(
        ValueError,
        'params cannot be kept with scope="global": a unit of 2.weight takes 24 params, one of '
        '0.weight 8, and which of them stay is not known beforehand. Use scope="local", or '
        "density=.",
    ):
        mvpfx.prepare(mlp(), mvpfx.PruningConfig(params=0.5, granularity="row", scope="global"))


def test_units_of_equal_cost_in_one_pool() -> None:
    model = mlp()
    mvpfx.prepare(model, mvpfx.PruningConfig(params=0.5, scope="global", **NOW))
    assert kept(model) == pytest.approx(0.5 * 316, abs=1)


def test_flops_need_a_call() -> None:
    with raises(
        ValueError,
        "Sequential: flops= is a fraction of the FLOPs of one call, which shows when it is called. "
        "Pass one batch to mvpfx.prepare as example_inputs=.",
    ):
        mvpfx.prepare(mlp(), mvpfx.PruningConfig(flops=0.5))


def test_flops_that_nobody_can_count() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with raises(
        ValueError,
        "idle.weight has no FLOPs that could be counted: the example inputs do not reach it, or an "
        "operator hides its matmul. Use params= in the place of flops=, or leave the site out: "
        'overrides={"idle": None}',
    ):
        mvpfx.prepare(Half(), mvpfx.PruningConfig(flops=0.5), example_inputs=X)


def test_totals_are_explained() -> None:
    model = mlp()
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            model.get_parameter(name)[12:] = 0
    text = mvpfx.explain(mvpfx.convert(model, example_inputs=X))
    lines = [line.split() for line in text.splitlines()]
    assert ["parameters", "316", "160", "0.5063"] in lines
    assert ["nonzero", "parameters", "208", "160", "0.7692"] in lines
    assert ["bytes", "1,264", "640", "0.5063"] in lines
    assert ["FLOPs", "2,880", "1,440", "0.5000"] in lines
