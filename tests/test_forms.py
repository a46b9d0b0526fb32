"""Queries, keys and values, and gates, that one matmul makes: parts of tiles, taken in any way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.kernels.library import LIBRARY, MISSING
from tests.test_fuse_tiles import chains_of_a_call, regions, zeroed

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=MISSING)

Taking = Callable[[Tensor], tuple[Tensor, ...]]
"""`[B, S, 96]` -> queries, keys and values `[B, 4, S, 8]`."""


def in_heads(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.view(*part.shape[:2], -1, 8).transpose(1, 2) for part in rows)


def parts(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 3, -1, 8)


def stacked(x: Tensor) -> Tensor:
    return parts(x).permute(2, 0, 3, 1, 4)


TAKINGS: dict[str, Taking] = {
    "split": lambda x: in_heads(*x.split(32, dim=2)),
    "split in sizes": lambda x: in_heads(*x.split([32, 32, 32], dim=-1)),
    "chunk": lambda x: in_heads(*x.chunk(3, dim=-1)),
    "chunks by number": lambda x: in_heads(*(torch.chunk(x, 3, 2)[i] for i in range(3))),
    "last first": lambda x: in_heads(*(x.chunk(3, dim=-1)[i] for i in (-1, -2, -3))),
    "slices": lambda x: in_heads(x[..., :32], x[..., 32:64], x[..., 64:]),
    "parts": lambda x: tuple(part.transpose(1, 2) for part in parts(x).unbind(dim=-3)),
    "parts by number": lambda x: tuple(parts(x)[:, :, i].transpose(1, 2) for i in range(3)),
    "permuted parts": lambda x: tuple(p.permute(0, 2, 1, 3) for p in parts(x).unbind(2)),
    "stacked": lambda x: tuple(stacked(x).unbind(0)),
    "stacked by number": lambda x: (stacked(x)[0], stacked(x)[1], stacked(x)[2]),
}
OTHERS: dict[str, Taking] = {
    "head by head": lambda x: tuple(x.view(*x.shape[:2], 4, 24).transpose(1, 2).chunk(3, dim=-1)),
    "every third": lambda x: in_heads(x[..., ::3], x[..., 1::3], x[..., 2::3]),
}


class Block(nn.Module):
    """Attention and a gated layer, of one matmul each before and after."""

    def __init__(self, take: Taking) -> None:
        super().__init__()
        self.take = take
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.take(self.qkv(x))
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        gate, up = self.up(x).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def pair(take: Taking) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = zeroed(nn.Sequential(Block(take), Block(take))), torch.randn(2, 11, 32)
    return model, mvpfx.convert(model, example_inputs=(x,), lowering="native"), x


@pytest.mark.parametrize("name", [*TAKINGS, *OTHERS])
def test_parts_of_one_product(name: str) -> None:
    model, small, x = pair((TAKINGS | OTHERS)[name])
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() <= 1e-5
        longer = torch.randn(3, 70, 32)
        assert (small(longer) - model(longer)).abs().max() <= 1e-5
    _, chains = chains_of_a_call(small, (x,))
    kinds = [step.kind for chain in chains for step in chain.steps]
    if name in OTHERS:
        assert "attend" not in kinds
        return
    assert len(chains) == 1
    # The gate is one step: activation and product.
    assert [kinds.count(kind) for kind in ("multiply", "attend", "combine")] == [8, 2, 2]


class Written(nn.Module):
    """Changes a part of what its layer returns, and reads the whole again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        gate, _ = y.chunk(2, dim=-1)
        gate.add_(x)
        return self.second(y)


def test_a_part_that_is_changed() -> None:
    torch.manual_seed(0)
    model, x = zeroed(nn.Sequential(Written())), torch.randn(2, 11, 32)
    small = mvpfx.convert(model, example_inputs=(x,), lowering="native")
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() <= 1e-5
    reasons = {reason for region in regions(small).values() for reason in region.declined}
    assert reasons == {"add_ changes a tensor that is read elsewhere"}
