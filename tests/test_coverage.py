"""The zoo: every model equals `W *= mask`, its regions are captured, all its weights are sites."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.region import block_names, region_of
from tests.zoo import GROUPS, ZOO
from tests.zoo.check import (
    RELATIVE,
    Outcome,
    check,
    compare,
    difference,
    masked_copy,
    masks,
    prepare,
)
from tests.zoo.count import multiplied_parameters
from tests.zoo.entry import SHAPES, Entry

FAST = (
    "BERT",
    "Gemma 2",
    "T5",
    "ViT",
    "nn.MultiheadAttention",
    "convolutions",
    "data-dependent control flow",
    "tied weights",
    "matmul, mm, linear",
    "complex rotary views",
)
"""What stands for the rest where there is little time; in two shapes, of sequence 1 one of them."""


def assert_covered(entry: Entry, outcome: Outcome) -> None:
    """All is equal, all is captured but for the reason that is known, and no weight is missing."""
    for shape, found in outcome.differences.items():
        apart = {name: value for name, value in found.items() if value > RELATIVE}
        assert not apart, f"shape {SHAPES[shape]}: {apart}"
    reasons = {
        r for found in (outcome.blocks, outcome.regions) for rs in found.values() for r in rs
    }
    if entry.fallback is None:
        assert not reasons
    else:
        assert reasons
        assert all(entry.fallback in reason for reason in reasons)
    assert outcome.missed == set(entry.misses)


@pytest.mark.parametrize("name", FAST)
def test_a_model_is_covered(name: str) -> None:
    assert_covered(ZOO[name], check(ZOO[name], shapes=(0, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_covered_in_every_shape(name: str) -> None:
    assert_covered(ZOO[name], check(ZOO[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.kind == "hf"])
def test_blocks_are_captured_by_the_default_configuration(name: str) -> None:
    entry = ZOO[name]
    model = mvpfx.prepare(entry.model())
    for shape in range(len(SHAPES)):
        model.eval()(**entry.batch(shape))
    for block in block_names(model):
        region = region_of(model.get_submodule(block))
        if region is not None:
            assert region.calls or region.declined
            assert all(entry.fallback and entry.fallback in r for r in region.declined)


def test_names_are_unique_and_shapes_include_one() -> None:
    assert len(ZOO) == sum(map(len, GROUPS.values()))
    assert {batch for batch, _ in SHAPES} >= {1, 2}
    assert 1 in {length for _, length in SHAPES}
    assert set(FAST) <= set(ZOO)


@pytest.mark.parametrize("name", ["BERT", "Llama", "ResNet", "nn.LSTM and nn.GRU"])
def test_an_entry_gives_the_same_model_and_batch_each_time(name: str) -> None:
    one, other = (copy.deepcopy(ZOO[name].model().state_dict()) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = ZOO[name].batch(1), ZOO[name].batch(1)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_wrong_mask_is_noticed() -> None:
    entry = ZOO["shared and called twice"]
    raw = entry.model()
    model = prepare(raw, entry.batch(0))
    reference = masked_copy(raw, model)
    assert max(compare(model, reference, raw, entry.batch(0)).values()) <= RELATIVE
    scores = masks(model)["twice.weight"].require_scores()
    with torch.no_grad():
        scores.copy_(scores.flip(0))
    found = compare(model, reference, raw, entry.batch(0))
    assert min(found.values()) > RELATIVE


def test_differences_are_relative_and_notice_what_is_no_number() -> None:
    assert difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert difference(None, torch.zeros(3)) == 0
    assert difference(None, torch.ones(3)) == float("inf")
    assert difference(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert difference(torch.ones(2), torch.ones(3)) == float("inf")
    assert difference(torch.ones(2), torch.ones(2).double()) == float("inf")


class Counted(nn.Module):
    """Weights that reach kernels by detours, and parameters that never do."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.turned, self.sliced = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.normed, self.gain = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.embedding, self.norm = nn.Embedding(5, 8), nn.LayerNorm([3, 8])
        self.conv, self.gru = nn.Conv1d(8, 8, 1), nn.GRU(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids)) * self.gain[:3]
        h = F.linear(h.bfloat16(), self.cast.bfloat16()).float()
        h = h @ self.turned.t().contiguous()
        h = torch.einsum("bsi,ij->bsj", h, self.sliced[:, :8])
        h = h @ (self.normed / self.normed.norm())
        return self.gru(self.conv(h.mT).mT)[0]


def test_the_count_follows_weights_and_nothing_else() -> None:
    model = Counted()
    found = multiplied_parameters(model, {"ids": torch.randint(5, (2, 3))})
    recurrent = {"gru.weight_ih_l0", "gru.weight_hh_l0"}
    assert found == {"cast", "turned", "sliced", "normed", "conv.weight", *recurrent}
