"""Models whose channels `benchmarks.structured_peers` removes: small, with random weights.

No bias is zero, and no running mean: what a channel of zero weights still hands on is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.workloads import Batch


@dataclass(frozen=True)
class Case:
    """A model, and the channels that go from it.

    Attributes:
        name: for people.
        build: makes the model; the weights are drawn anew.
        batch: what it is called with, by keyword.
        zeroed: layer -> output channels whose weights are zero.
        roots: the layers that a peer which follows dependencies is asked to prune; what hangs on
            them follows. All of `zeroed` where it is empty.
        norms: layer -> the norm that its output goes through.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Batch
    zeroed: dict[str, list[int]]
    roots: tuple[str, ...] = ()
    norms: dict[str, str] = field(default_factory=dict[str, str])


class Residual(nn.Module):
    """Stem, one block with a shortcut, head; the block's convolutions are padded or 1 x 1."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        around = size // 2
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, bias=bias), nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, size, padding=around, bias=bias)
        self.conv2 = nn.Conv2d(32, 16, size, padding=around, bias=bias)
        self.norm1, self.norm2 = nn.BatchNorm2d(32), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to scores `[B, 5]`."""
        x = torch.relu(self.norm0(self.stem(x)))
        inner = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(x + self.norm2(self.conv2(inner))).mean((2, 3)))


class FeedForward(nn.Module):
    """The FFN of an encoder layer, with its norm and shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states `[B, S, 32]` to hidden states."""
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


def mlp() -> nn.Module:
    """Three linear layers."""
    first, second, third = nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 5)
    return nn.Sequential(first, nn.GELU(), second, nn.ReLU(), third)


def convolutions(padding: int = 0, norm: bool = True) -> nn.Module:
    """Two convolutions, pooled, and a linear head."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32)):
        layers.append(nn.Conv2d(before, after, 3, padding=padding))
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def bert() -> nn.Module:
    """Two layers of 4 heads of width 16, with a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=99,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=32,
        )
    )


def build(case: Case, silent: bool, seed: int = 0) -> nn.Module:
    """The masked model: weights of the channels are zero, biases stay as they are.

    Args:
        case: which model, which channels.
        silent: set to zero, too, all else that such a channel hands on: its bias, and the bias and
            the running mean of the norm behind it.
        seed: of all weights.
    """
    torch.manual_seed(seed)
    model = case.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.get_buffer("running_mean").normal_(0, 0.3)
                module.get_buffer("running_var").uniform_(0.5, 1.5)
        for name, channels in case.zeroed.items():
            layer, norm = model.get_submodule(name), case.norms.get(name)
            layer.get_parameter("weight")[channels] = 0
            if silent and isinstance(layer.bias, nn.Parameter):
                layer.bias[channels] = 0
            if silent and norm is not None:
                model.get_submodule(norm).get_parameter("bias")[channels] = 0
                model.get_submodule(norm).get_buffer("running_mean")[channels] = 0
    return model


def cases() -> list[Case]:
    """All cases, in the order of the table."""
    return [*_linear_cases(), *_convolution_cases(), *_residual_cases(), *_bert_cases()]


def _linear_cases() -> list[Case]:
    return [
        Case("MLP", mlp, {"input": _random(4, 16)}, {"0": _half(64), "2": _half(32)}),
        Case(
            "FFN with its norm and shortcut",
            FeedForward,
            {"x": _random(2, 8, 32)},
            {"up": _half(64)},
        ),
    ]


def _convolution_cases() -> list[Case]:
    images = {"input": _random(4, 3, 12, 12)}
    plain = partial(convolutions, norm=False)
    chain, norms = {"0": _half(16), "3": _half(32)}, {"0": "1", "3": "4"}
    return [
        Case("convolutions", plain, images, {"0": _half(16)}),
        Case("convolutions, batch norm", convolutions, images, chain, norms=norms),
        Case(
            "convolutions, batch norm, padded",
            partial(convolutions, padding=1),
            images,
            chain,
            norms=norms,
        ),
    ]


def _residual_cases() -> list[Case]:
    images = {"x": _random(4, 3, 12, 12)}
    pointwise, padded = partial(Residual, 1, bias=True), partial(Residual, 3, bias=False)
    inner = {"conv1": _half(32)}
    stream = {"stem": _half(16), "conv2": _half(16)}
    norms = {"stem": "norm0", "conv1": "norm1", "conv2": "norm2"}
    return [
        Case("residual block, inner channels", pointwise, images, inner, norms=norms),
        Case("residual block, its stream", pointwise, images, stream, ("stem",), norms),
        Case("residual block, padded, no biases", padded, images, inner, norms=norms),
    ]


def _bert_cases() -> list[Case]:
    ids = {"input_ids": torch.randint(0, 99, (2, 8), generator=torch.Generator().manual_seed(0))}
    layers = [f"bert.encoder.layer.{index}" for index in range(2)]
    units = {f"{layer}.intermediate.dense": _half(128) for layer in layers}
    attention = [f"{layer}.attention.self" for layer in layers]
    first_and_third = [*range(16), *range(32, 48)]
    parts = ("query", "key", "value")
    heads = {f"{name}.{part}": first_and_third for name in attention for part in parts}
    roots = tuple(f"{name}.query" for name in attention)
    return [
        Case("BERT, FFN units", bert, ids, units),
        Case("BERT, heads", bert, ids, heads, roots),
    ]


def _half(count: int) -> list[int]:
    return list(range(0, count, 2))


def _random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))
