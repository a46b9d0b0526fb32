"""The penalty: its value, its gradient, and its absence."""

import pytest
import torch
from torch import nn

from mvpfx.penalty import penalty
from mvpfx.scheduler import SparsityScheduler
from tests.toy_masks import Stack, values


def test_mean_over_sites_of_the_mean_in_each(device: str) -> None:
    stack = Stack(
        values(2, 2, device=device),
        values(8, 2, seed=1, device=device),
        criterion="soft_movement",
        penalty_lambda=5.0,
    )
    scheduler = SparsityScheduler(stack, 4)
    assert penalty(stack).item() == 0
    scheduler.step()
    scheduler.step()
    factor = stack.mask_list[0].penalty_lambda
    assert 0 < factor < 5
    scores = [mask.require_scores() for mask in stack.mask_list]
    found = penalty(stack)
    assert found.device.type == device
    assert found.dtype == torch.float32
    means = [torch.sigmoid(s).mean() for s in scores]
    torch.testing.assert_close(found, factor * (means[0] + means[1]) / 2)
    found.backward()
    for s in scores:
        sigmoid = torch.sigmoid(s)
        torch.testing.assert_close(s.grad, factor / 2 * sigmoid * (1 - sigmoid) / s.numel())


@pytest.mark.parametrize("criterion", ["movement", "magnitude"])
def test_criteria_without_one(criterion: str, device: str) -> None:
    stack = Stack(values(2, 2, device=device), criterion=criterion)
    SparsityScheduler(stack, 1).step()
    found = penalty(stack)
    assert found.shape == ()
    assert found.item() == 0
    assert found.device.type == device


def test_models_without_masks_or_parameters() -> None:
    assert penalty(nn.Linear(2, 2)).item() == 0
    assert penalty(nn.ReLU()).item() == 0


def test_each_shared_mask_counts_once() -> None:
    stack = Stack(values(2, 2), criterion="soft_movement")
    SparsityScheduler(stack, 1).step()
    both = nn.ModuleList([stack, nn.Sequential(stack)])
    assert torch.equal(penalty(both), penalty(stack))
