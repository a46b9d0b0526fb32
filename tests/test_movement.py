"""What movement pruning promises: Sanh et al. 2020, appendix A.1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvpfx.optim import parameter_groups
from mvpfx.schedule import ConstantSchedule
from mvpfx.scheduler import SparsityScheduler
from tests.toy_masks import Stack, values


def smooth(outputs: Tensor, target: Tensor) -> Tensor:
    """A loss whose second derivatives are at most 1."""
    return 0.5 * (outputs - target).square().sum()


@pytest.mark.parametrize("keep", [1, 6, 12, 20])
def test_a_swap_of_connections_never_raises_the_loss_to_first_order(keep: int) -> None:
    """Each output adds up contributions `a = W * M * x`. A connection that takes the place of
    another changes the loss by `dL/da_k * a_k - dL/da_i * a_i`, which is never positive; what the
    loss really does is that and at most half of the square of the change of the outputs.
    """
    swaps = 0
    for seed in range(40):
        stack = Stack(values(4, 6, seed=seed), plan=ConstantSchedule(), density=keep / 24)
        (mask,), (weight,) = stack.mask_list, stack.weights
        with torch.no_grad():
            mask.require_scores().copy_(0.1 * values(4, 6, seed=1000 + seed))
        x, target = values(6, seed=2000 + seed), values(4, seed=3000 + seed)
        scheduler = SparsityScheduler(stack, total_steps=5)
        # The weights' learning rate is 0 to see the swap alone: (b) of the proof, in the limit.
        groups = parameter_groups(stack, lr=0.0, score_lr=0.05, weight_decay=0.0)
        optimizer = torch.optim.SGD(groups)
        for _ in range(5):
            before = mask.kept().clone()
            contributions = mask(weight) * x
            contributions.retain_grad()
            loss = smooth(contributions.sum(1), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            gradient = contributions.grad
            assert gradient is not None
            after, old = mask.kept(), contributions.detach()
            new = (mask(weight) * x).detach()
            swapped = int((after & ~before).sum())
            assert swapped == int((before & ~after).sum())
            swaps += swapped
            predicted = float((gradient * (new - old)).sum())
            assert predicted <= 1e-5
            bound = 0.5 * float((new - old).sum(1).square().sum())
            assert float(smooth(new.sum(1), target) - loss.detach()) <= predicted + bound + 1e-5
    assert swaps >= 40, "connections were swapped often enough to tell"
