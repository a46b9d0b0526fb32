"""Random small models: linear layers and convolutions with what may stand between them."""

# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = Callable[["RandomGraph", list[Tensor]], Tensor]
"""Reads layers from the model it is given, since copies of a model have layers of their own."""


class RandomGraph(nn.Module):
    """A forward drawn from a seed: each operation reads values made before and makes one more.

    Values are `[2, 5, C]` in a model of tokens and `[2, C, 6, 6]` in one of images.
    """

    def __init__(self, seed: int, images: bool, operations: int = 7) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.images = images
        self.dim = 1 if images else 2
        self.layers = nn.ModuleList()
        self.operations: list[Operation] = []
        self.dead: list[int] = []
        self.channels = [6]
        for _ in range(operations):
            self._add(self.draw.choice(IMAGE if images else TOKENS))
        self._add(_linear)
        self.last = self.draw.sample(range(len(self.channels)), 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5)
            for place in self.dead:
                self.layers[place].get_parameter("weight").zero_()

    def example(self) -> Tensor:
        """An input."""
        torch.manual_seed(1)
        return torch.randn(2, 6, 6, 6) if self.images else torch.randn(2, 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Run the operations; the result is the last value, and means of two others."""
        values = [x]
        for operation in self.operations:
            values.append(operation(self, values))
        others = sum(values[i].mean(dim=self.dim, keepdim=True) for i in self.last)
        return values[-1] + others

    def pick(self) -> int:
        """The place of a value, later ones more often."""
        return max(self.draw.randrange(len(self.channels)) for _ in range(2))

    def layer(self, module: nn.Module) -> int:
        """Add a layer; its place."""
        self.layers.append(module)
        return len(self.layers) - 1

    def _add(self, choice: Callable[[RandomGraph], tuple[Operation, int] | None]) -> None:
        made = choice(self)
        if made is not None:
            self.operations.append(made[0])
            self.channels.append(made[1])


Made = tuple[Operation, int] | None


def _linear(graph: RandomGraph) -> Made:
    place, width = graph.pick(), graph.draw.choice((4, 6, 8, 12))
    bias = graph.draw.random() < 0.7
    if graph.images:
        size, padding = graph.draw.choice(((1, 0), (3, 1)))
        layer = nn.Conv2d(graph.channels[place], width, size, padding=padding, bias=bias)
    else:
        layer = nn.Linear(graph.channels[place], width, bias=bias)
    index = graph.layer(layer)
    return (lambda model, values: model.layers[index](values[place])), width


def _activation(graph: RandomGraph) -> Made:
    place = graph.pick()
    function: Any = graph.draw.choice((torch.relu, F.gelu, torch.tanh, torch.sigmoid, F.silu))
    return (lambda model, values: function(values[place])), graph.channels[place]


def _chosen(graph: RandomGraph) -> Made:
    place, slope = graph.pick(), graph.draw.choice((0.0, 0.1))
    if graph.draw.random() < 0.5:
        return (
            lambda model, values: torch.where(values[place] > 0, values[place], slope)
        ), graph.channels[place]
    return (
        lambda model, values: values[place].masked_fill(values[place] < 0, slope)
    ), graph.channels[place]


def _residual(graph: RandomGraph) -> Made:
    place = graph.pick()
    width = graph.channels[place]
    alike = [i for i, c in enumerate(graph.channels) if c == width]
    other = graph.draw.choice(alike)
    gated = graph.draw.random() < 0.4
    if gated:
        return (lambda model, values: values[place] * torch.sigmoid(values[other])), graph.channels[
            place
        ]
    return (lambda model, values: values[place] + values[other]), width


def _norm(graph: RandomGraph) -> Made:
    place = graph.pick()
    width = graph.channels[place]
    if graph.images:
        layer: nn.Module = nn.BatchNorm2d(width)
    else:
        layer = graph.draw.choice((nn.LayerNorm, nn.RMSNorm))(width)
    index = graph.layer(layer)
    return (lambda model, values: model.layers[index](values[place])), width


def _slicewise(graph: RandomGraph) -> Made:
    """What acts on each channel of an image by itself, and keeps its size."""
    place = graph.pick()
    function: Any = graph.draw.choice((
        lambda h: F.avg_pool2d(F.interpolate(h, scale_factor=2), 2),
        lambda h: F.max_pool2d(h, 3, 1, 1),
        lambda h: F.avg_pool2d(h, 3, 1, 1),
        lambda h: F.avg_pool2d(F.pad(h, (1, 1, 1, 1), mode="replicate"), 3, 1),
        lambda h: F.max_pool2d(F.pad(h, (0, 1, 1, 0), value=0.5), 2, 1),
        lambda h: h - h.max(3, keepdim=True)[0],
        lambda h: h * F.adaptive_avg_pool2d(h, 1).expand_as(h),
        lambda h: F.normalize(h, dim=2) + h.std((2, 3), keepdim=True),
        lambda h: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2),
        lambda h: h.sort(3)[0].cumsum(2),
    ))  # fmt: skip
    return (lambda model, values: function(values[place])), graph.channels[place]


def _per_channel(graph: RandomGraph) -> Made:
    """A layer with groups of channels, or parameters for each."""
    place = graph.pick()
    width = graph.channels[place]
    groups = graph.draw.choice([g for g in (1, 2, 3, 4, width) if width % g == 0])
    layer = graph.draw.choice((
        nn.GroupNorm(groups, width, affine=graph.draw.random() < 0.7),
        nn.InstanceNorm2d(width, affine=graph.draw.random() < 0.7),
        nn.PReLU(width),
        nn.Conv2d(width, 2 * width, 3, padding=1, groups=groups),
        nn.Conv2d(width, groups, 1, groups=groups, bias=graph.draw.random() < 0.7),
        nn.ConvTranspose2d(width, width, 3, padding=1, groups=groups),
        nn.ChannelShuffle(groups),
    ))  # fmt: skip
    index = graph.layer(layer)
    out: int = layer.out_channels if isinstance(layer, nn.Conv2d) else width
    return (lambda model, values: model.layers[index](values[place])), out


def _gated(graph: RandomGraph) -> Made:
    place = graph.pick()
    width = graph.channels[place]
    if width % 2:
        return None
    return (lambda model, values: F.glu(values[place], dim=graph.dim)), width // 2


def _split(graph: RandomGraph) -> Made:
    place = graph.pick()
    width, part = graph.channels[place], graph.draw.randrange(2)
    if width % 2:
        return None
    dim, way = graph.dim, graph.draw.randrange(3)
    if way == 0:
        return (lambda model, values: torch.chunk(values[place], 2, dim)[part]), width // 2
    half: Any = width // 2 if way == 1 else [width // 2, width // 2]
    return (lambda model, values: torch.split(values[place], half, dim)[part]), width // 2


def _concatenate(graph: RandomGraph) -> Made:
    one, other = graph.pick(), graph.pick()
    width = graph.channels[one] + graph.channels[other]
    return (lambda model, values: torch.cat((values[one], values[other]), dim=graph.dim)), width


def _shared(graph: RandomGraph) -> Made:
    kind: Any = nn.Conv2d if graph.images else nn.Linear
    known = [i for i, layer in enumerate(graph.layers) if isinstance(layer, kind)]
    if not known:
        return None
    index = graph.draw.choice(known)
    layer: Any = graph.layers[index]
    inputs = layer.in_channels if graph.images else layer.in_features
    outputs = layer.out_channels if graph.images else layer.out_features
    places = [i for i, c in enumerate(graph.channels) if c == inputs]
    if not places:
        return None
    place = graph.draw.choice(places)
    return (lambda model, values: model.layers[index](values[place])), outputs


def _gated_pair(graph: RandomGraph) -> Made:
    """A fused gated layer: one matmul makes both halves."""
    place, width = graph.pick(), graph.draw.choice((4, 8))
    layer = nn.Linear(graph.channels[place], 2 * width, bias=graph.draw.random() < 0.5)
    index = graph.layer(layer)

    def run(model: RandomGraph, values: list[Tensor]) -> Tensor:
        gate, up = model.layers[index](values[place]).chunk(2, dim=-1)
        return F.silu(gate) * up

    return run, width


def _attention(graph: RandomGraph) -> Made:
    """Self-attention with a fused projection of four heads."""
    place = graph.pick()
    layer = nn.Linear(graph.channels[place], 3 * 16, bias=graph.draw.random() < 0.5)
    index = graph.layer(layer)

    def run(model: RandomGraph, values: list[Tensor]) -> Tensor:
        x = values[place]
        q, k, v = model.layers[index](x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(*x.shape[:2], -1)

    return run, 16


def _torch_attention(graph: RandomGraph) -> Made:
    """Attention of one value to another by torch's own layer, its heads two wide."""
    place, other = graph.pick(), graph.pick()
    width, inner = graph.channels[place], graph.channels[other]
    if width % 2:
        return None
    options: Any = {} if width == inner else {"kdim": inner, "vdim": inner}
    layer = nn.MultiheadAttention(width, width // 2, batch_first=True, **options)
    index = graph.layer(layer)

    def run(model: RandomGraph, values: list[Tensor]) -> Tensor:
        x, y = values[place], values[other]
        return model.layers[index](x, y, y, need_weights=False)[0]

    return run, width


def _dead_branch(graph: RandomGraph) -> Made:
    """A residual branch whose last layer is all zeros."""
    place = graph.pick()
    width = graph.channels[place]
    up, down = graph.layer(nn.Linear(width, 8)), graph.layer(nn.Linear(8, width))
    graph.dead.append(down)
    return (
        lambda model, values: (
            values[place] + model.layers[down](F.gelu(model.layers[up](values[place])))
        )
    ), width


TOKENS = (
    _linear, _linear, _linear, _activation, _activation, _chosen, _residual, _norm, _split,
    _concatenate, _gated, _shared, _gated_pair, _attention, _torch_attention, _dead_branch,
)  # fmt: skip
IMAGE = (
    _linear, _linear, _linear, _activation, _chosen, _residual, _norm, _slicewise, _slicewise,
    _per_channel, _per_channel, _gated, _split, _concatenate, _shared,
)  # fmt: skip
