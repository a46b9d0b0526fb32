"""Head counts that equal another size, and attention weights that blocks return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx


class Attention(nn.Module):
    """Attention whose forward reads sizes that may be equal: `how` says which."""

    def __init__(self, how: str, heads: int, head_dim: int, rotary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.rotary, self.h, self.width = how, rotary, heads, head_dim
        self.q, self.k, self.v, self.o = (
            nn.Linear(heads * head_dim, heads * head_dim) for _ in "qkvo"
        )

    def turn(self, x: Tensor) -> Tensor:
        if self.how == "split":
            a, b = x.split([self.rotary, self.width - self.rotary], -1)
        elif self.how == "narrow":
            a, b = x.narrow(-1, 0, self.rotary), x.narrow(-1, self.rotary, self.width - self.rotary)
        elif self.how == "by a table":
            size = torch.ones(self.rotary).shape[0]
            a, b = x[..., :size], x[..., size:]
        else:
            a, b = x[..., : self.rotary], x[..., self.rotary :]
        return torch.cat([a * 2, b], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        shape = (b, t, self.h, self.width)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.o(out.transpose(1, 2).reshape(b, t, self.h * self.width))


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ("slice", (4, 8, 4)),
        ("split", (4, 8, 4)),
        ("narrow", (4, 8, 4)),
        ("by a table", (4, 8, 4)),
        ("slice", (8, 8, 4)),
        ("split", (4, 4, 2)),
    ],
)
def test_heads_go_where_their_number_equals_another_size(
    how: str, sizes: tuple[int, int, int]
) -> None:
    model = Attention(how, *sizes).eval()
    half = sizes[0] * sizes[1] // 2
    with torch.no_grad():
        model.o.weight[:, half:] = 0
    x = torch.randn(2, 5, half * 2)
    small: Any = mvpfx.convert(model, example_inputs=x, lowering="dense")
    assert small.o.weight.shape == (half * 2, half)
    assert (small.h, small.width, small.rotary) == (sizes[0] // 2, *sizes[1:])
    other = torch.randn(1, 3, half * 2)
    torch.testing.assert_close(small(other), model(other))


class Block(nn.Module):
    """Attention that returns its weights besides its result."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in "qkvo")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:-1], self.heads, 4)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.softmax(q @ k.transpose(-1, -2) / 2, -1)
        out = (F.dropout(weights, training=self.training) @ v).transpose(1, 2)
        return x + self.o(out.reshape(*x.shape[:-1], -1)), weights


class Stack(nn.Module):
    """Blocks, and what is made of the weights that they return."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.use = nn.ModuleList(Block() for _ in range(2)), use

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = []
        for layer in self.layers:
            x, weights = layer(x)
            seen.append(weights)
        if self.use == "adds":
            return x + seen[0].mean(1)[..., :1]
        if self.use == "stacks":
            return x, torch.stack(seen)
        return (x, seen) if self.use == "returns" else x


@pytest.mark.parametrize(("use", "left"), [("", 8), ("returns", 8), ("adds", 16), ("stacks", 16)])
def test_returned_attention_weights_lose_heads_where_nothing_computes_with_them(
    use: str, left: int
) -> None:
    model = Stack(use).eval()
    with torch.no_grad():
        model.layers[0].get_submodule("o").weight[:, 4:12] = 0  # pyright: ignore[reportIndexIssue]
    x = torch.randn(2, 5, 16)
    small: Any = mvpfx.convert(model, example_inputs=x, lowering="dense")
    assert small.layers[0].o.weight.shape == (16, left)
    found, expected = small(x), model(x)
    if use != "returns":
        torch.testing.assert_close(found, expected)
        return
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], [expected[1][0][:, [0, 3]], expected[1][1]])
    assert "4 -> 2 heads in the attention weights that it returns" in mvpfx.explain(small)


def test_constant_values_leave_returned_attention_weights_as_they_are() -> None:
    model = Stack("returns").eval()
    with torch.no_grad():
        model.layers[0].get_submodule("v").weight.zero_()  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 5, 16)
    small = mvpfx.convert(model, example_inputs=x, lowering="dense")
    torch.testing.assert_close(small(x), model(x))
