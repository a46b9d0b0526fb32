"""Bad input: each mistake has an error that names it in full."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportArgumentType=false

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from tests.models import build


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def whole(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_model_without_a_site() -> None:
    message = (
        "ReLU has no weight that feeds a matmul, so there is nothing to prune. Needed: a linear or "
        "convolution layer, or example_inputs= that show a functional matmul on a parameter."
    )
    with pytest.raises(ValueError, match=whole(message)):
        mvpfx.prepare(nn.ReLU())


def test_overrides_that_leave_no_site() -> None:
    message = (
        "overrides leave no site in Sequential: 2 weights feed a matmul. Remove an override of "
        'None, or add a site with a dict, such as overrides={"0.weight": {}}.'
    )
    with pytest.raises(ValueError, match=whole(message)):
        mvpfx.prepare(two_layers(), mvpfx.PruningConfig(overrides={"0": None, "2": None}))


def test_preparing_twice() -> None:
    model = mvpfx.prepare(two_layers())
    message = (
        "Sequential is prepared already. Prepare a model once; to start again with another "
        "configuration, load the model again, or convert it first to prune what is left."
    )
    with pytest.raises(ValueError, match=whole(message)):
        mvpfx.prepare(model)


def test_preparing_fails_without_changing_the_model() -> None:
    model = two_layers()
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    config = mvpfx.PruningConfig(granularity=(5, 4))
    with pytest.raises(ValueError, match="which 5 x 4 blocks do not tile"):
        mvpfx.prepare(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    mvpfx.prepare(model)


def test_block_that_does_not_tile() -> None:
    message = (
        "0.weight is 12 x 8, which 5 x 4 blocks do not tile (12 = 2 * 5 + 2).\n"
        'Use a block height that divides 12, or leave the site out: overrides={"0": None}'
    )
    with pytest.raises(ValueError, match=whole(message)):
        mvpfx.prepare(two_layers(), mvpfx.PruningConfig(granularity=(5, 4)))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (torch.zeros(2, 9), "(2, 9)"),
        ((torch.zeros(2, 8), torch.zeros(1)), "(2, 8), (1,)"),
        ({"wrong": torch.zeros(2, 8)}, "wrong=(2, 8)"),
    ],
    ids=["shape", "count", "name"],
)
def test_example_inputs_that_do_not_fit(inputs: Any, found: str) -> None:
    start = "^example_inputs do not fit Sequential.forward: "
    end = re.escape(
        f"Found {found}; needed what the model is called with: a tensor, a tuple of positional "
        "arguments, or a dict of keyword arguments."
    )
    for call in (mvpfx.prepare, mvpfx.convert):
        with pytest.raises(ValueError, match=f"{start}.*{end}$"):
            call(two_layers(), example_inputs=inputs)


def test_meta_and_integer_weights_name_the_site() -> None:
    with torch.device("meta"):
        model = two_layers()
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        mvpfx.prepare(model)
    model = two_layers()
    model[2].weight = nn.Parameter(torch.ones(4, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"2\.weight holds int8 values"):
        mvpfx.prepare(model)


def test_nan_scores_name_the_site() -> None:
    model = mvpfx.prepare(two_layers(), mvpfx.PruningConfig(density=0.5))
    with torch.no_grad():
        model.get_parameter("2.weight_mask.scores")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight has 1 NaN among the 48 scores"):
        model(torch.zeros(1, 8))


def test_scheduler_limits() -> None:
    model = mvpfx.prepare(two_layers())
    with pytest.raises(ValueError, match="total_steps must be at least 1; found 0"):
        mvpfx.SparsityScheduler(model, 0)
    scheduler = mvpfx.SparsityScheduler(model, 4)
    for _ in range(4):
        scheduler.step()
    message = (
        "step 5 is past the end: the run has total_steps=4. Call scheduler.step() once per "
        "optimizer step, not per batch, or build SparsityScheduler with as many total_steps as "
        "you take."
    )
    with pytest.raises(ValueError, match=whole(message)):
        scheduler.step()
    with pytest.raises(ValueError, match="Linear has no masks to schedule"):
        mvpfx.SparsityScheduler(nn.Linear(2, 2), 4)


def test_convert_without_zeros_says_that_nothing_was_gained() -> None:
    model, batch = build("mlp")
    small = mvpfx.convert(model.eval(), example_inputs=batch)
    assert torch.equal(small(**batch), model(**batch))
    assert "Nothing was gained" in mvpfx.explain(small)


def test_unknown_lowering() -> None:
    with pytest.raises(ValueError, match="unknown lowering 'fast'"):
        mvpfx.convert(two_layers(), lowering="fast")


def test_tables_of_a_plain_model() -> None:
    message = (
        "Linear is neither prepared nor converted. Call mvpfx.prepare(model) before fine-tuning, "
        "or mvpfx.convert(model) for deployment."
    )
    for call in (mvpfx.sparsity_table, mvpfx.explain, mvpfx.graphs):
        with pytest.raises(ValueError, match=whole(message)):
            call(nn.Linear(2, 2))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_functional_site_without_example_inputs_is_found_at_its_first_call() -> None:
    model = mvpfx.prepare(Functional(), mvpfx.PruningConfig(schedule=mvpfx.ConstantSchedule()))
    assert not [name for name in model.state_dict() if name.endswith("scores")]
    out = model(torch.ones(1, 8))
    kept = model.get_submodule("w_mask").mask()  # pyright: ignore[reportCallIssue]
    assert int(kept.sum()) == round(0.15 * 32)
    torch.testing.assert_close(out, torch.ones(1, 8) @ (dict(model.named_parameters())["w"] * kept))
    assert mvpfx.SparsityScheduler(model, 3).density == pytest.approx(0.15)


def test_functional_site_after_the_optimizer_was_built() -> None:
    model = mvpfx.prepare(Functional())
    mvpfx.parameter_groups(model, lr=1e-3)
    message = (
        "w feeds a matmul, but had no scores when the optimizer or scheduler was built. Pass "
        "example_inputs= to mvpfx.prepare, call the prepared model once before building them, or "
        'leave it alone: overrides={"w": None}.'
    )
    with pytest.raises(ValueError, match=whole(message)):
        model(torch.ones(1, 8))
