"""The native loops of the training step beside plain operations, on one thread and several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvpfx.training_kernels import library
from tests.toy_masks import values

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason="the library was not built")
SIZES = [1, 15, 16, 63, 1000, (1 << 15) - 1, (1 << 15) + 17, 3 << 15]


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
def test_elementwise(size: int) -> None:
    grad, weight, mask = values(size), values(size, seed=1), values(size, seed=2) > 0
    assert torch.equal(library.multiply(weight, mask), weight * mask)
    masked, movement = library.gradients(grad, weight, mask)
    assert torch.equal(masked, grad * mask)
    assert torch.equal(movement, grad * weight)
    scores, taken = values(size, seed=3), grad.clone()
    wanted = scores - 0.7 * grad * weight
    library.take_movement(taken, weight, mask, scores, 0.7)
    assert torch.equal(taken, grad * mask)
    torch.testing.assert_close(scores, wanted)
    assert torch.equal(library.at_least(weight, 0.3), weight >= torch.tensor(0.3))


@pytest.mark.parametrize("size", SIZES)
def test_packing(size: int) -> None:
    mask = values(size) > 0
    bits = library.pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-size // 8)
    assert bits.tolist() == np.packbits(mask.numpy(), bitorder=sys.byteorder).tolist()
    assert torch.equal(library.unpack(bits, mask.shape), mask)


def test_what_is_packed() -> None:
    mask = values(8, 8) > 0
    assert library.packs(mask)
    assert not library.packs(mask.t()), "has gaps"
    assert not library.packs(values(8)), "is no mask"
    with TorchDispatchMode():
        assert not library.packs(mask), "is watched"


@pytest.mark.parametrize("block", [(1, 1), (32, 32), (1, 96), (192, 1), (3, 5), (100, 7)], ids=str)
def test_blocks(block: tuple[int, int]) -> None:
    units = (7, 3)
    shape = (units[0] * block[0], units[1] * block[1])
    grad, weight, mask = values(*shape), values(*shape, seed=1), values(*shape, seed=2) > 0
    masked, sums = library.block_gradients(grad, weight, mask, units, block)
    assert torch.equal(masked, grad * mask)
    products = (grad.double() * weight.double()).view(units[0], block[0], units[1], block[1])
    torch.testing.assert_close(sums.double(), products.sum((1, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bracket", [(-0.1, 0.1), (0.0, 0.0), (-9.0, 9.0), (5.0, float("inf"))])
def test_splitting(size: int, bracket: tuple[float, float]) -> None:
    scores, (low, high) = values(size).mul(20).round().div(20), bracket
    inside = torch.full((size + 5,), 99.0)
    above, found = library.split(scores, low, high, inside)
    wanted = scores[(scores >= low) & (scores <= high)]
    assert (above, found) == (int((scores > high).sum()), len(wanted))
    assert torch.equal(inside[:found].sort().values, wanted.sort().values)
    assert (inside[found:] == 99.0).all(), "nothing is written past the end"


def test_what_does_not_fit_is_counted_only() -> None:
    scores, inside = values(1 << 17), torch.full((1000,), 99.0)
    room = inside[:900]
    assert library.split(scores, -1e9, 1e9, room) == (0, 1 << 17)
    assert (inside[900:] == 99.0).all()
    assert torch.isin(room, scores).all()


@pytest.mark.parametrize("place", [0, 17, 999])
def test_nan_are_reported(place: int) -> None:
    scores = values(1000)
    scores[place] = float("nan")
    assert library.split(scores, 5.0, 6.0, torch.empty(10))[1] == -1


class Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Special(Tensor):
    pass


def test_what_it_leaves_to_torch() -> None:
    weight, mask = values(4, 6), values(4, 6, seed=1) > 0
    assert library.serves(weight, mask) and library.serves(nn.Parameter(weight), mask)
    others: list[tuple[Tensor, Tensor]] = [
        (weight.double(), mask),
        (weight.bfloat16(), mask),
        (weight.t(), mask.t()),
        (weight, mask[:, :5]),
        (weight, mask.float().to(torch.int8)),
        (weight.as_subclass(Special), mask),
        (weight.to("meta"), mask.to("meta")),
    ]
    assert not any(library.serves(*pair) for pair in others)
    with Watching():
        assert not library.serves(weight, mask)


@pytest.mark.parametrize("size", [2, 15, 16, 1000, 1 << 13])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_top_of_few(size: int, levels: int) -> None:
    scores = values(size).mul(levels).round().div(levels)
    order = scores.sort(descending=True, stable=True).indices
    for count in {1, size // 3 or 1, size - 1, size}:
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[order[:count]] = True
        found = library.top(scores, count)
        assert found is not None and torch.equal(found, wanted)
    scores[size // 2] = torch.nan
    assert library.top(scores, 1) is None
