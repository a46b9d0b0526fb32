"""HeldMask: a decision in a bit a weight between a backward and the next forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.held_mask import HeldMask
from mvpfx.mask import Mask
from mvpfx.ranking import Ranking
from mvpfx.torch_private import StorageWeakRef
from mvpfx.training_kernels import library
from tests.toy_masks import Stack, make_mask, values

packed = pytest.mark.skipif(library.LIBRARY is None, reason="the library was not built")


def half(*shape: int, **fields: Any) -> tuple[Mask, nn.Parameter]:
    """A mask that keeps half of its units, and its weight."""
    mask, weight = make_mask(values(*shape), **fields)
    mask.density = 0.5
    return mask, weight


def storage(mask: Mask) -> StorageWeakRef:
    """Of which weights stay, without keeping it alive."""
    return StorageWeakRef(mask.mask().untyped_storage())


@pytest.fixture
def rankings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever something is ranked."""
    found: list[int] = []
    select = Ranking._select

    def counted(ranking: Ranking) -> list[Tensor]:
        found.append(len(ranking.masks))
        return select(ranking)

    monkeypatch.setattr(Ranking, "_select", counted)
    return found


@packed
@pytest.mark.parametrize("out_dim", [0, 1])
def test_packed_and_unpacked(out_dim: int) -> None:
    kept = values(5, 7) > 0
    expand = Tensor.t if out_dim else Tensor.clone
    held = HeldMask("key", kept, expand(kept))
    for _ in range(2):
        held.pack()
        held.pack()
        assert held.decision is None
        units, mask = held.unpack(expand)
        assert torch.equal(units, kept) and torch.equal(mask, expand(kept))


def test_without_the_library_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", None)
    held = HeldMask("key", values(4, 4) > 0, values(4, 4) > 0)
    before = held.decision
    held.pack()
    assert held.decision is before is not None


@packed
@pytest.mark.parametrize("out_dim", [0, 1])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_after_a_backward_no_byte_a_weight_is_held(scope: str, out_dim: int) -> None:
    model = Stack(values(6, 8), values(8, 6, seed=1), density=0.5, scope=scope, out_dim=out_dim)
    for mask in model.mask_list:
        mask.set_step(1, 1)
    products = [mask(mask.weight).sum() for mask in model.mask_list]
    before = [(storage(mask), mask.mask().clone()) for mask in model.mask_list]
    assert not any(each.expired() for each, _ in before)
    torch.stack(products).sum().backward()
    del products
    assert all(each.expired() for each, _ in before)
    assert all(
        torch.equal(m.mask(), was) for m, (_, was) in zip(model.mask_list, before, strict=True)
    )


@packed
def test_batches_of_one_step_are_ranked_once(rankings: list[int]) -> None:
    mask, weight = half(8, 8)
    for _ in range(3):
        mask(weight).sum().backward()
    assert len(rankings) == 1
    assert weight.grad is not None
    assert torch.equal(weight.grad, 3 * mask.mask().float())


@packed
def test_two_forwards_before_their_backwards() -> None:
    mask, weight = half(8, 8)
    first, second = mask(weight), mask(weight)
    wanted = mask.mask().float()
    first.sum().backward()
    second.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, 2 * wanted)


@packed
def test_what_is_read_in_inference_mode_serves_training() -> None:
    mask, weight = half(8, 8)
    mask(weight).sum().backward()
    with torch.inference_mode():
        kept = mask.kept()
    mask(weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, 2 * kept.float())


def test_larger_units_and_frozen_ones_are_not_packed() -> None:
    mask, weight = half(8, 8, granularity=(2, 2))
    frozen, other = half(8, 8)
    frozen.plan = mvpfx.CubicSchedule(freeze=True)
    frozen.freeze(values(8, 8) > 0)
    for each, parameter in ((mask, weight), (frozen, other)):
        before = each.mask()
        each(parameter).sum().backward()
        assert each.mask() is before


def test_a_ranking_that_is_asked_again_ranks_again(rankings: list[int]) -> None:
    model = Stack(values(6, 8), values(8, 6, seed=1), density=0.5, scope="global")
    first, second = model.mask_list
    for mask in model.mask_list:
        mask.set_step(1, 1)
    ranking = first.ranking
    kept, other = ranking.kept(first), ranking.kept(second)
    assert rankings == [2]
    assert torch.equal(ranking.kept(first), kept) and rankings == [2, 2]
    assert torch.equal(ranking.kept(second), other) and rankings == [2, 2]
