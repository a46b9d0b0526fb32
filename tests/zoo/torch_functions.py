"""Models of plain torch that multiply by raw parameters, in every form there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx.torch_private import grouped_mm
from tests.zoo.entry import SHAPES, Batch, Entry
from tests.zoo.torch_layers import WIDTH, activations


def weight(*shape: int) -> nn.Parameter:
    """A small random parameter."""
    return nn.Parameter(torch.randn(*shape) * 0.2)


class Products(nn.Module):
    """matmul by its function, its operator, its methods; the weight right or left."""

    def __init__(self) -> None:
        super().__init__()
        self.operator, self.function, self.method = (weight(WIDTH, WIDTH) for _ in range(3))
        self.left, self.turned, self.linear = (weight(WIDTH, WIDTH) for _ in range(3))
        self.mm, self.mm_method, self.sliced = weight(32, 32), weight(32, 32), weight(64, 32)
        self.listed = nn.ParameterList([weight(WIDTH, WIDTH) for _ in range(2)])
        self.named = nn.ParameterDict({"a": weight(WIDTH, WIDTH)})
        self.inner, self.contracted = weight(WIDTH, WIDTH), weight(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.operator
        h = torch.matmul(h, self.function)
        h = h.matmul(self.method.t())
        h = (self.left @ h.mT).mT
        h = h @ self.turned.transpose(0, 1)
        h = F.linear(h, self.linear)
        h = F.linear(h, self.sliced[:32])
        flat = h.reshape(-1, WIDTH)
        flat = torch.mm(flat, self.mm).mm(self.mm_method.T)
        h = flat.view(x.shape)
        for each in self.listed:
            h = torch.matmul(h, each)
        h = h @ self.named["a"]
        h = torch.inner(h, self.inner)
        return torch.tensordot(h, self.contracted, dims=1)


class Batched(nn.Module):
    """bmm, addmm, baddbmm and einsum, with and without an output in the equation."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.addmm, self.addmm_method = weight(WIDTH, WIDTH), weight(WIDTH, WIDTH)
        self.bank, self.added = weight(3, WIDTH, WIDTH), weight(3, WIDTH, WIDTH)
        self.mixed, self.heads, self.implicit = weight(32, 32), weight(32, 4, 8), weight(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        flat = torch.addmm(self.bias, flat, self.addmm.t())
        flat = self.bias.addmm(flat, self.addmm_method)
        rows = flat.unsqueeze(0).expand(3, -1, -1)
        rows = torch.bmm(rows, self.bank)
        rows = torch.baddbmm(self.bias.expand(3, 1, -1), rows, self.added)
        h = rows.sum(0).view(x.shape)
        h = torch.einsum("bsi,ij->bsj", h, self.mixed)
        h = torch.einsum("bsi,ihd->bshd", h, self.heads).flatten(2)
        return torch.einsum("...i,ij", h, self.implicit)


class Convolved(nn.Module):
    """Convolutions by function, one of them with a weight that is reshaped first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = weight(8, 32, 3), weight(8, 32, 2)
        self.plane, self.flat = weight(4, 1, 3, 3), weight(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x.mT, self.first, padding=1)
        h = F.conv_transpose1d(h, self.second)
        h = F.conv2d(h.unsqueeze(1), self.plane, padding=1).mean(1)
        return torch.conv1d(h[:, :8], self.flat.unsqueeze(-1))


class Grouped(nn.Module):
    """One matrix a group of rows; the groups are as even as the rows allow."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, WIDTH, 16).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH).bfloat16()
        ends = torch.arange(1, 5, dtype=torch.int32) * (rows.shape[0] // 4)
        ends[3] = rows.shape[0]
        return grouped_mm(rows, self.experts, offs=ends).float()


class Rotary(nn.Module):
    """Attention that turns queries and keys as complex numbers."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        angles = torch.outer(torch.arange(64.0), 0.1 ** torch.arange(4.0))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[-2]]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Spectral(nn.Module):
    """A complex weight applied to the spectrum, and a real one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.filter = nn.Parameter(torch.randn(17, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x), dim=-1)
        return torch.fft.irfft(spectrum * torch.view_as_complex(self.filter), n=WIDTH, dim=-1)


def _grouped_rows(shape: int) -> Batch:
    return {"x": torch.randn(*SHAPES[shape], WIDTH)}


ENTRIES = (
    Entry("matmul, mm, linear", "torch", Products, activations),
    Entry("addmm, bmm, einsum", "torch", Batched, activations),
    Entry("functional convolutions", "torch", Convolved, activations),
    Entry("grouped matmul", "torch", Grouped, _grouped_rows),
    Entry("complex rotary views", "torch", Rotary, activations),
    Entry("complex spectrum", "torch", Spectral, activations),
)
