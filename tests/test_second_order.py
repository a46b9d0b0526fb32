"""Second order: the losses and changes of weights are those of the quadratic they stand for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mvpfx
from mvpfx import fisher
from mvpfx.schedule import CubicSchedule, LinearSchedule, Schedule
from tests.toy_masks import Stack, make_mask, raises, sharded, values

BLOCKS, SIZE, DAMPING = 3, 6, 0.05


@pytest.fixture
def matrices() -> Tensor:
    """Fisher matrices of more gradients than weights, float64."""
    found = torch.zeros(BLOCKS, SIZE, SIZE, dtype=torch.float64)
    for seed in range(40):
        fisher.add_gradient(found, values(BLOCKS, SIZE, seed=seed).double(), beta=0.9)
    return found


def rise(matrices: Tensor, change: Tensor) -> Tensor:
    """`1/2 d^T (F + damping) d` of each block."""
    damped = matrices + DAMPING * torch.eye(SIZE, dtype=matrices.dtype)
    return 0.5 * torch.einsum("ni,nij,nj->n", change, damped, change)


def test_the_average_is_that_of_outer_products() -> None:
    found = torch.zeros(BLOCKS, SIZE, SIZE)
    first, second = values(BLOCKS, SIZE), values(BLOCKS, SIZE, seed=1)
    fisher.add_gradient(found, first, beta=0.75)
    fisher.add_gradient(found, second, beta=0.75)
    for block in range(BLOCKS):
        wanted = 0.75 * 0.25 * first[block].outer(first[block])
        wanted += 0.25 * second[block].outer(second[block])
        torch.testing.assert_close(found[block], wanted)


def test_no_other_change_of_what_stays_raises_the_loss_less(matrices: Tensor) -> None:
    weights = values(BLOCKS, SIZE, seed=9).double()
    gone = torch.tensor([[1, 0, 1, 0, 0, 0], [0] * 6, [1] * 6]).bool()
    masked = torch.tensor([[0, 1, 0, 0, 0, 0], [0] * 6, [0] * 6]).bool()
    kept = ~gone & ~masked
    change = fisher.compensation(matrices, weights, gone, kept, DAMPING)
    assert not change[~kept].any() and not change[1:].any()
    change -= weights * gone
    least = rise(matrices, change)[0]
    for seed in range(50):
        other = 0.1 * values(BLOCKS, SIZE, seed=seed).double() * kept
        assert rise(matrices, change + other)[0] > least


@pytest.mark.parametrize("cols", [1, 2, 3, 6])
def test_the_loss_of_a_piece_is_the_least_that_its_going_costs(matrices: Tensor, cols: int) -> None:
    weights = values(BLOCKS, SIZE, seed=9).double()
    kept = torch.ones(BLOCKS, SIZE, dtype=torch.bool)
    kept[0, :cols] = False
    found = fisher.loss_without(matrices, weights, kept, DAMPING, cols)
    assert not found[0, :cols].any()
    for start in range(0, SIZE, cols):
        gone = torch.zeros_like(kept)
        gone[:, start : start + cols] = kept[:, start : start + cols]
        change = fisher.compensation(matrices, weights, gone, kept & ~gone, DAMPING)
        wanted = rise(matrices, change - weights * gone)
        torch.testing.assert_close(found[:, start : start + cols].sum(1), wanted)


def test_without_gradients_it_is_magnitude_pruning() -> None:
    stack = Stack(values(4, 6), values(5, 4, seed=1), criterion="second_order", density=0.4)
    before = [weight.detach().clone() for weight in stack.weights]
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=3)
    for _ in range(3):
        scheduler.step()
    for mask, weight in zip(stack.mask_list, before, strict=True):
        assert torch.equal(mask.weight, weight)
        cut = weight.abs().flatten().sort(descending=True).values[round(0.4 * weight.numel()) - 1]
        assert torch.equal(mask.kept(), weight.abs() >= cut)


def test_what_is_masked_does_not_come_back() -> None:
    plan = LinearSchedule(warmup=0, cooldown=2)
    stack = Stack(values(8, 8), plan=plan, criterion="second_order", density=0.2)
    scheduler = mvpfx.SparsityScheduler(stack, total_steps=10)
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(stack, lr=0.05))
    (mask,) = stack.mask_list
    kept = mask.kept()
    for step in range(10):
        (stack(values(4, 8, seed=step)) - values(4, 8, seed=step + 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert not (mask.kept() & ~kept).any()
        kept = mask.kept()
    assert mask.density_now == pytest.approx(0.2, abs=0.01)


def test_all_cuts_made_the_matrices_rest() -> None:
    stack = Stack(values(4, 4), criterion="second_order", density=0.5)
    (mask,) = stack.mask_list
    mask.density = 0.5
    with torch.no_grad():
        mask.criterion.observe(mask, values(4, 4))
    assert not mask.averages()[0].any()


@pytest.mark.parametrize(("granularity", "size"), [("element", 50), ((2, 4), 48), ("row", 48)])
def test_blocks_hold_whole_units(granularity: Any, size: int) -> None:
    mask, _ = make_mask(values(6, 96), granularity, criterion="second_order")
    assert mask.averages()[0].shape == (-(-6 * 96 // size), size, size)
    other, _ = make_mask(
        values(6, 96), granularity, criterion="second_order", criterion_options={"block": 8}
    )
    assert other.averages()[0].shape == (72, 8, 8)


def test_the_schedule_that_is_not_said_has_few_cuts() -> None:
    assert mvpfx.PruningConfig(criterion="second_order").schedule == CubicSchedule(cuts=20)
    assert mvpfx.PruningConfig().schedule == CubicSchedule()
    said = mvpfx.PruningConfig(criterion="second_order", schedule=CubicSchedule())
    assert said.schedule == CubicSchedule()


@pytest.mark.parametrize(
    ("schedule", "cuts"), [(CubicSchedule(), 350), (CubicSchedule(cuts=100), None)]
)
def test_many_cuts_are_said_to_take_long(schedule: Schedule, cuts: int | None) -> None:
    stack = Stack(values(4, 4), plan=schedule, criterion="second_order")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mvpfx.SparsityScheduler(stack, total_steps=500)
    wanted = (
        f"second_order solves for its weights at each of {cuts} cuts, which takes long. Give the "
        "schedule fewer, such as CubicSchedule(cuts=20)."
    )
    assert [str(each.message) for each in caught] == ([wanted] if cuts else [])


def test_sharded_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(values(4, 4), criterion="second_order")
    monkeypatch.setattr("mvpfx.cut.is_sharded", sharded)
    message = (
        "stack.0.weight is sharded over ranks, and second_order looks at whole weights. Use DDP, "
        "or another criterion."
    )
    with raises(ValueError, message):
        mvpfx.SparsityScheduler(stack, total_steps=6)


def test_options_that_count_are_whole() -> None:
    with raises(TypeError, "criterion_options['block'] must be a whole number; found 3.5."):
        mvpfx.PruningConfig(criterion="second_order", criterion_options={"block": 3.5})
