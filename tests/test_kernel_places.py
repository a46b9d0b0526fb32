"""Convolutions: N:M patterns and blocks are of input channels at one place of the kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.granularity import Granularity, kernel_places
from mvpfx.mask import Mask
from mvpfx.site import Site
from mvpfx.straight_through import both_gradients
from mvpfx.training_kernels import library

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "Conv1d": (nn.Conv1d(8, 12, 3), torch.randn(2, 8, 9)),
    "Conv2d": (nn.Conv2d(16, 8, 3), torch.randn(1, 16, 7, 7)),
    "Conv3d": (nn.Conv3d(4, 8, 2), torch.randn(1, 4, 4, 4, 4)),
    "groups": (nn.Conv2d(16, 8, 3, groups=2), torch.randn(1, 16, 7, 7)),
    "one place": (nn.Conv2d(16, 8, 1), torch.randn(1, 16, 7, 7)),
    "patches": (nn.Conv2d(4, 8, 4, stride=4), torch.randn(1, 4, 8, 8)),
    "transposed": (nn.ConvTranspose2d(8, 16, 3), torch.randn(1, 8, 5, 5)),
}


def prepared(name: str, granularity: Any, **fields: Any) -> tuple[nn.Module, Mask, Tensor]:
    """One layer at its final density, its mask, and its input."""
    layer, x = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(type(layer)(**arguments(layer)))
    fields = {"criterion": "magnitude", "density": 0.5, **fields}
    config = mvpfx.PruningConfig(
        granularity=granularity, schedule=mvpfx.ConstantSchedule(), **fields
    )
    mvpfx.prepare(model, config, example_inputs=x)
    mvpfx.SparsityScheduler(model, total_steps=1)
    return model, next(m for m in model.modules() if isinstance(m, Mask)), x


def arguments(layer: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "groups")
    return {name: getattr(layer, name) for name in names}


def channels_last(mask: Mask, kept: Tensor) -> Tensor:
    """`[outputs, places, input channels]` of a weight `[outputs, inputs, *places]`."""
    if mask.site.out_dim == 1:
        kept = kept.transpose(0, 1)
    return kept.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "second_order"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_of_four_channels_stay_at_each_place(name: str, criterion: str) -> None:
    model, mask, x = prepared(name, "2:4", criterion=criterion)
    kept = channels_last(mask, mask.mask())
    assert (kept.unflatten(2, (-1, 4)).sum(3) == 2).all()
    small = mvpfx.convert(model.eval(), example_inputs=x, lowering="dense")
    found = channels_last(mask, small[0].weight != 0)  # pyright: ignore[reportIndexIssue]
    assert torch.equal(found, kept)
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_block_is_of_channels_at_one_place(name: str, block: tuple[int, int]) -> None:
    model, mask, x = prepared(name, block)
    kept = channels_last(mask, mask.mask())
    rows, cols = block
    units = kept.unflatten(2, (-1, cols)).unflatten(0, (-1, rows)).sum((1, 4))
    assert set(units.unique().tolist()) == {0, rows * cols}
    small = mvpfx.convert(model.eval(), example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_best_blocks_stay(name: str) -> None:
    _, mask, _ = prepared(name, (1, 4))
    sums = channels_last(mask, mask.weight.detach().abs()).unflatten(2, (-1, 4)).sum(3).flatten()
    kept = channels_last(mask, mask.mask()).unflatten(2, (-1, 4)).all(3).flatten()
    assert sums[kept].min() > sums[~kept].max()


@pytest.mark.parametrize("way", ["native", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_scores_receive_the_sum_over_their_block(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "plain":
        monkeypatch.setattr(library, "LIBRARY", None)
    _, mask, _ = prepared(name, (1, 4), criterion="movement")
    weight = mask.weight.detach()
    gradient = torch.randn_like(weight)
    movement = both_gradients(gradient, weight, mask.mask(), mask.layout)[1]
    wanted = channels_last(mask, gradient * weight).unflatten(2, (-1, 4)).sum(3)
    assert mask.scores is not None and movement.shape == mask.scores.shape
    found = movement.unflatten(1, (-1, kernel_places(mask.site))).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


def test_second_order_removes_the_block_that_costs_least() -> None:
    """With gradients of one example, whose Fisher matrix is of rank one and known."""
    model, mask, x = prepared(
        "Conv2d", (1, 4), criterion="second_order", criterion_options={"block": 4}, density=0.75
    )
    model(x).square().sum().backward()
    scores = mask.require_scores()
    assert torch.isfinite(scores).all() and scores.shape == (8, 4 * 9)
    kept = channels_last(mask, mask.mask()).unflatten(2, (-1, 4))
    assert set(kept.sum(3).unique().tolist()) == {0, 4}


def test_linear_layers_and_joined_weights_have_one_place() -> None:
    assert kernel_places(Site("a.weight", (8, 4))) == 1
    assert kernel_places(Site("a.weight", (3, 8, 4), parts=3)) == 1
    assert kernel_places(Site("a.weight", (8, 4, 3, 5))) == 15


@pytest.mark.parametrize(("granularity", "density"), [((1, 3), 0.5), ("1:3", 1 / 3)], ids=str)
def test_channels_that_do_not_fill_groups_are_named(granularity: Any, density: float) -> None:
    # 16 * 9 inputs are a multiple of 3; 16 channels are not.
    with pytest.raises(ValueError, match=r"kernel(.|\n)*16 = 5 \* 3 \+ 1"):
        prepared("Conv2d", granularity, density=density)


def test_side_by_side_and_back() -> None:
    shape = Granularity(1, 4, places=9)
    matrix = torch.arange(2 * 8 * 9).view(2, 72)
    there = shape.side_by_side(matrix)
    assert there[0, :4].tolist() == [0, 9, 18, 27]
    assert torch.equal(shape.as_before(there), matrix)


def test_a_checkpoint_of_blocks_goes_on(tmp_path: Path) -> None:
    model, mask, _ = prepared("Conv2d", (1, 4), criterion="movement")
    with torch.no_grad():
        mask.require_scores().normal_()
    other, found, _ = prepared("Conv2d", (1, 4), criterion="movement")
    other.load_state_dict(model.state_dict())
    assert torch.equal(found.mask(), mask.mask())


def test_a_state_of_blocks_that_lay_side_by_side_in_memory_is_refused() -> None:
    model, _, _ = prepared("Conv2d", (1, 4), criterion="movement")
    state = {name: value for name, value in model.state_dict().items() if "places" not in name}
    with pytest.raises(RuntimeError, match=re.escape("places")):
        model.load_state_dict(state)
