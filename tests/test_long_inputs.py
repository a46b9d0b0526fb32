"""Inputs of many tiles: what one tile has does not lie where another's is put.

A residual that is read across attentions lies beside queries, keys and values of another width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mvpfx
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.kernels.plan import Draft, Value, slots_of
from tests.test_fuse_tiles import regions, zeroed


class PreNorm(nn.Module):
    """A block whose residual is not normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.first(x)).chunk(3, dim=-1)
        heads = [part.view(*part.shape[:2], 4, 8).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.second(x))))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
@pytest.mark.parametrize("shape", [(1, 197), (1, 256), (3, 197), (8, 128), (5, 40), (1, 1024)])
def test_many_tiles(shape: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    model = zeroed(nn.Sequential(*(PreNorm() for _ in range(3))), 0.2)
    example = torch.randn(2, 8, 32)
    small = mvpfx.convert(model, example_inputs=(example,), lowering="native")
    for _ in range(3):
        x = torch.randn(*shape, 32)
        with torch.no_grad():
            assert (small(x) - model(x)).abs().max() <= 1e-5
    assert any(region.calls for region in regions(small).values())


def test_values_in_one_slot_have_one_width() -> None:
    widths = (32, 96, 32, 96, 64)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{at}") for at in range(len(widths))]
    values = [Value(at, 0, width) for at, width in enumerate(widths)]
    drafts = [Draft("enter", (), values[0], "", node=nodes[0])]
    drafts += [
        Draft("multiply", (before,), after, "", layers=("layer",))
        for before, after in itertools.pairwise(values)
    ]
    drafts.append(Draft("leave", (values[-1],), None, "", node=nodes[-1]))
    slots = slots_of(drafts, range(len(widths)), (), first=100)
    assert sorted(slots) == list(range(len(widths)))
    by_slot = {
        slot: {widths[n] for n, at in slots.items() if at == slot} for slot in slots.values()
    }
    assert all(len(found) == 1 for found in by_slot.values())
    # What is not needed at the same time still shares: two of 32 features, and two of 96.
    assert (slots[0], slots[1]) == (slots[2], slots[3])
    assert min(slots.values()) == 100 and len(by_slot) == 3
