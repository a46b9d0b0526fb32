"""Models of plain torch built from its own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.zoo.entry import COMPUTED, SHAPES, Batch, Entry, ids

WIDTH = 32


def activations(shape: int) -> Batch:
    """Random activations."""
    return {"x": torch.randn(*SHAPES[shape], WIDTH)}


def _source(shape: int) -> Batch:
    return {"src": torch.randn(*SHAPES[shape], WIDTH)}


def _source_and_target(shape: int) -> Batch:
    batch, length = SHAPES[shape]
    return {"src": torch.randn(batch, length, WIDTH), "tgt": torch.randn(batch, length + 2, WIDTH)}


def _images(shape: int) -> Batch:
    side = (12, 12, 20, 9)[shape]
    return {"input": torch.randn((2, 1, 2, 3)[shape], 3, side, side)}


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 4, 1, 2, 48, batch_first=True)


class Attention(nn.Module):
    """Packed self-attention, then cross-attention with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.own(x, x, x, need_weights=False)
        out, weights = self.cross(h, x[..., :16], x[..., :8])
        return out + weights.sum()


def _conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, groups=2),
        nn.GELU(),
        nn.ConvTranspose2d(16, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Recurrent(nn.Module):
    """An LSTM and a GRU of two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 16, num_layers=2, batch_first=True)
        self.gru = nn.GRU(16, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class DataDependent(nn.Module):
    """Takes one of two ways, as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.down(F.relu(self.up(x)))
        return self.other(x)


class Tied(nn.Module):
    """An output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 99, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(x))))


class SharedLayers(nn.Module):
    """One block under two names, each called, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.blocks = nn.ModuleList([block, block])
        self.twice = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.twice(F.relu(self.twice(x)))


class Symmetric(nn.Module):
    """A parametrization of the user's own: the weight is symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Parametrized(nn.Module):
    """Weights that are computed from other parameters, beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.symmetric = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.symmetric, "weight", Symmetric())
        self.own_norm = OwnNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.own_norm(self.symmetric(self.normed(F.gelu(self.plain(x)))))


class OwnNorm(nn.Module):
    """Weight normalisation as it was before torch had parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(WIDTH, 1))
        self.weight_v = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


def _tokens(shape: int) -> Batch:
    return {"x": ids(shape)}


_COMPUTED = (
    "normed.parametrizations.weight.original0",
    "normed.parametrizations.weight.original1",
    "symmetric.parametrizations.weight.original",
    "own_norm.weight_g",
    "own_norm.weight_v",
)
ENTRIES = (
    Entry("nn.TransformerEncoder", "torch", _encoder, _source),
    Entry("nn.Transformer", "torch", _transformer, _source_and_target),
    Entry("nn.MultiheadAttention", "torch", Attention, activations),
    Entry("convolutions", "torch", _conv_net, _images),
    Entry("nn.LSTM and nn.GRU", "torch", Recurrent, activations),
    Entry(
        "data-dependent control flow",
        "torch",
        DataDependent,
        activations,
        fallback="its control flow depends on data",
    ),
    Entry("tied weights", "torch", Tied, _tokens),
    Entry("shared and called twice", "torch", SharedLayers, activations),
    Entry(
        "parametrized weights",
        "torch",
        Parametrized,
        activations,
        misses=dict.fromkeys(_COMPUTED, COMPUTED),
    ),
)
