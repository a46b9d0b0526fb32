"""Selection of the cut: the same as a full stable sort, whatever the scores are like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvpfx import selection
from mvpfx.selection import find_cut
from mvpfx.top_v import _on_accelerator, top_v
from tests.toy_masks import raises

MANY = 200_000
SHARES = [0.0, 0.001, 0.15, 0.5, 0.7, 0.999]


def by_sorting(scores: list[Tensor], count: int) -> Tensor:
    flat = torch.cat([part.flatten() for part in scores])
    marked = torch.zeros(flat.numel(), dtype=torch.bool)
    marked[flat.sort(descending=True, stable=True).indices[:count]] = True
    return marked


def random(count: int = MANY, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def some(value: float, share: float) -> Tensor:
    """Random scores, of which a share is one value."""
    chosen = torch.rand(MANY, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(chosen, torch.tensor(value), random())


ADVERSARIES: dict[str, list[Tensor]] = {
    "random": [random()],
    "constant": [torch.zeros(MANY)],
    "two values": [(random() > 0).float()],
    "half of them equal": [some(0.0, 0.5)],
    "many equal within": [some(0.5, 0.3)],
    "denormals": [random() * 1e-42],
    "tiny and huge": [random() ** 21],
    "rising": [random().sort().values],
    "falling": [random().sort(descending=True).values],
    "periodic": [torch.arange(MANY).remainder(64).float()],
    "infinite": [some(math.inf, 0.4)],
    "minus infinite": [some(-math.inf, 0.4)],
    "zeros of both signs": [torch.where(random() > 0, -0.0, 0.0)],
    "neighbouring floats": [torch.where(random() > 0, 1.0, 1.0 + 2.0**-23)],
    "a few far above": [torch.cat([random() * 1e-6, torch.full((3,), 1e9)])],
    "whole numbers": [random().mul(3).round()],
    "double": [random().double()],
    "half": [random().half()],
    "of unlike sizes": [random(7), random(150_000).view(-1, 10), torch.zeros(50_000), random(1)],
    "not contiguous": [random().view(400, 500).t()],
}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_as_by_a_full_stable_sort(name: str, share: float, way: str) -> None:
    scores = ADVERSARIES[name]
    total = sum(part.numel() for part in scores)
    count = max(1, round(share * total))
    found = top_v(scores, count)
    assert [part.shape for part in found] == [part.shape for part in scores]
    assert torch.equal(torch.cat([part.flatten() for part in found]), by_sorting(scores, count))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_what_an_accelerator_runs_is_the_same(name: str, share: float) -> None:
    scores = ADVERSARIES[name]
    total = sum(part.numel() for part in scores)
    count = max(1, round(share * total))
    found = torch.cat([part.flatten() for part in _on_accelerator(scores, count, total)])
    assert torch.equal(found, by_sorting(scores, count))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(selection.FEW, 4 * selection.FEW),
    digits=st.integers(0, 4),
    share=st.floats(0, 1),
)
def test_any_sizes_and_ties(seed: int, size: int, digits: int, share: float) -> None:
    scores = [random(size, seed).mul(10**digits).round(), random(3, seed).round()]
    count = round(share * (size + 3))
    found = torch.cat(top_v(scores, count))
    assert torch.equal(found, by_sorting(scores, count))


def test_one_score(way: str) -> None:
    assert top_v([torch.tensor([3.0])], 1)[0].tolist() == [True]
    assert top_v([torch.tensor([3.0])], 0)[0].tolist() == [False]
    assert find_cut([torch.tensor([3.0])], 1) == (3.0, 1, 1)


@pytest.mark.parametrize("size", [10, MANY])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_are_refused(size: int, place: int, way: str) -> None:
    scores = random(size)
    scores[place] = math.nan
    with raises(ValueError, "scores are NaN, which have no rank."):
        top_v([scores], size // 2)


def test_a_misleading_sample_costs_passes_and_no_exactness(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    brackets = [(5.0, 6.0), (-6.0, -5.0), (0.0, 0.0), (-9.0, 9.0), (9.0, math.inf)]
    for bracket in brackets:

        def misled(*_: Any, found: tuple[float, float] = bracket) -> tuple[float, float]:
            return found

        monkeypatch.setattr(selection, "_bracket", misled)
        scores = random()
        assert torch.equal(top_v([scores], 30_000)[0], by_sorting([scores], 30_000))


def test_it_takes_a_pass_or_three(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    split = selection._split

    def counted(scores: list[Tensor], *bracket: float) -> object:
        passes.append(sum(part.numel() for part in scores))
        return split(scores, *bracket)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(selection, "_split", counted)
    for name in ("random", "half of them equal", "constant", "two values", "of unlike sizes"):
        for share in (0.03, 0.15, 0.5):
            passes.clear()
            scores = ADVERSARIES[name]
            total = sum(part.numel() for part in scores)
            find_cut([part.flatten() for part in scores], round(share * total))
            most = 3.2 if name == "two values" else 1.3  # where the cut is between all of them
            assert sum(passes) <= most * total, (name, share, passes)


def test_the_random_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    top_v([random()], 1000)
    found = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2))
def test_places_of_floats_order_as_they_do(dtype: torch.dtype, values: list[float]) -> None:
    values = sorted({0.0 if value == 0 else value for value in values})
    places = [selection._place(value, dtype) for value in values]
    assert places == sorted(set(places))
    assert [selection._value(place, dtype) for place in places] == values


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
def test_a_hundred_million(ties: bool) -> None:
    scores = random(100_000_000)
    if ties:
        scores.mul_(20).round_()
    count = 15_000_000
    (found,) = top_v([scores], count)
    assert int(found.sum()) == count
    least, most = scores[found].min(), scores[~found].max()
    assert least >= most
    if ties:  # those that stay of the last value are its first
        tied = (scores == least).nonzero().squeeze(1)
        kept = found[tied]
        assert least == most and kept[: int(kept.sum())].all()
