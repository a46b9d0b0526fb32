"""Operations between two convolutions: dead channels go through them, and the function stays."""

# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx

WIDTH = 8
HALF, PAIRS = (0, 1, 2, 3), (0, 1, 4, 5)
"""Which channels are dead: a half, or the first two of each half."""


class Op(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class WithParameters(nn.Module):
    """Functions that are given parameters per channel."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.groups = 2
        self.before = nn.Identity()
        self.weight, self.bias = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "prelu":
            return F.prelu(x, self.weight)
        if self.name == "group_norm":
            return F.group_norm(x, self.groups, self.weight, self.bias)
        return F.instance_norm(x, weight=self.weight, bias=self.bias)


def grid(h: Tensor) -> Tensor:
    line = torch.linspace(-1, 1, 5, dtype=h.dtype)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    return F.grid_sample(h, places.expand(h.shape[0], 5, 5, 2), align_corners=True)


def wide(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A layer that makes 16 channels, and a convolution back to 8."""
    return nn.Sequential(kind(WIDTH, 16, *args, **kwargs), nn.Conv2d(16, WIDTH, 1))


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "upsample nearest": (lambda: nn.Upsample(scale_factor=2), HALF),
    "upsample bilinear": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), HALF),
    "interpolate bicubic": (
        lambda: lambda h: F.interpolate(h, scale_factor=2, mode="bicubic"), HALF),
    "interpolate area": (lambda: lambda h: F.interpolate(h, size=(5, 5), mode="area"), HALF),
    "interpolate like": (lambda: lambda h: h + F.interpolate(h[:, :, ::2], size=h.shape[2:]), HALF),
    "zero pad": (lambda: nn.ZeroPad2d(1), HALF),
    "constant pad": (lambda: nn.ConstantPad2d(1, 0.0), HALF),
    "reflection pad": (lambda: nn.ReflectionPad2d(1), HALF),
    "replication pad": (lambda: nn.ReplicationPad2d(1), HALF),
    "circular pad": (lambda: nn.CircularPad2d(1), HALF),
    "pad": (lambda: lambda h: F.pad(h, (0, 1, -1, 1)), HALF),
    "pad reflect": (lambda: lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"), HALF),
    "circular convolution": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), HALF),
    "dropout2d": (lambda: nn.Dropout2d(), HALF),
    "feature alpha dropout": (lambda: nn.FeatureAlphaDropout(), HALF),
    "F.dropout2d": (lambda: lambda h: F.dropout2d(h, training=False), HALF),
    "prelu": (lambda: nn.PReLU(WIDTH), HALF),
    "prelu of one slope": (lambda: nn.PReLU(), HALF),
    "F.prelu": (lambda: WithParameters("prelu"), HALF),
    "instance norm": (lambda: nn.InstanceNorm2d(WIDTH, affine=True), HALF),
    "instance norm, plain": (lambda: nn.InstanceNorm2d(WIDTH), HALF),
    "instance norm, tracked": (
        lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), HALF),
    "F.instance_norm": (lambda: WithParameters("instance_norm"), HALF),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), HALF),
    "group norm, plain": (lambda: nn.GroupNorm(4, WIDTH, affine=False), PAIRS),
    "F.group_norm": (lambda: WithParameters("group_norm"), HALF),
    "batch norm": (lambda: nn.BatchNorm2d(WIDTH), HALF),
    "grouped convolution": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=2), HALF),
    "grouped, the same in each": (lambda: wide(nn.Conv2d, 3, groups=2), PAIRS),
    "grouped, padded": (lambda: wide(nn.Conv2d, 3, groups=4, padding=1), PAIRS),
    "depthwise": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH), HALF),
    "depthwise, multiplier": (lambda: wide(nn.Conv2d, 3, groups=WIDTH), HALF),
    "depthwise, no bias": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), HALF),
    "transposed": (lambda: wide(nn.ConvTranspose2d, 3), HALF),
    "transposed, groups": (lambda: wide(nn.ConvTranspose2d, 3, groups=2), HALF),
    "transposed, the same in each": (lambda: wide(nn.ConvTranspose2d, 3, groups=2), PAIRS),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, groups=WIDTH), HALF),
    "channel shuffle": (lambda: nn.ChannelShuffle(2), PAIRS),
    "F.channel_shuffle": (lambda: lambda h: F.channel_shuffle(h, 2), PAIRS),
    "pixel shuffle": (
        lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, WIDTH, 1)), HALF),
    "pixel unshuffle": (
        lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, WIDTH, 1)), HALF),
    "unfold and fold": (
        lambda: lambda h: F.fold(F.unfold(h, 2, stride=2), (8, 8), 2, stride=2), HALF),
    "unfold, padded": (
        lambda: lambda h: F.fold(F.unfold(h, 3, padding=1), (8, 8), 3, padding=1), HALF),
    "max": (lambda: lambda h: h - h.max(3, keepdim=True)[0], HALF),
    "max and gather": (lambda: lambda h: h.max(3, keepdim=True)[1].to(h.dtype) * h, HALF),
    "min": (lambda: lambda h: h.min(2)[0].unsqueeze(2) + h, HALF),
    "amax of two": (lambda: lambda h: h - h.amax((2, 3), keepdim=True), HALF),
    "norm": (lambda: lambda h: h / (1 + h.norm(dim=3, keepdim=True)), HALF),
    "vector_norm": (
        lambda: lambda h: h / (1 + torch.linalg.vector_norm(h, dim=(2, 3), keepdim=True)), HALF),
    "normalize": (lambda: lambda h: F.normalize(h, dim=3), HALF),
    "std": (lambda: lambda h: h * h.std((2, 3), keepdim=True), HALF),
    "var": (lambda: lambda h: h * h.var(3, keepdim=True), HALF),
    "topk": (lambda: lambda h: h.topk(3, 3)[0], HALF),
    "sort": (lambda: lambda h: h.sort(3)[0], HALF),
    "cumsum": (lambda: lambda h: h.cumsum(2), HALF),
    "median": (lambda: lambda h: h - h.median(3, keepdim=True)[0], HALF),
    "quantile": (lambda: lambda h: h - h.quantile(0.25, 3, keepdim=True), HALF),
    "logsumexp": (lambda: lambda h: h * h.logsumexp(3, keepdim=True), HALF),
    "argmax": (lambda: lambda h: h * h.argmax(3, keepdim=True), HALF),
    "softmax": (lambda: lambda h: h * h.softmax(3), HALF),
    "rsub": (lambda: lambda h: h * (1 - h.sigmoid()), HALF),
    "glu": (lambda: nn.Sequential(nn.GLU(1), nn.Conv2d(4, WIDTH, 1)), PAIRS),
    "F.glu of columns": (lambda: lambda h: F.glu(h, dim=3), HALF),
    "gate by chunk": (
        lambda: nn.Sequential(
            Op(lambda h: h.chunk(2, 1)[0] * torch.sigmoid(h.chunk(2, 1)[1])),
            nn.Conv2d(4, WIDTH, 1)), PAIRS),
    "expand_as": (lambda: lambda h: h * h.mean((2, 3), keepdim=True).expand_as(h), HALF),
    "repeat": (lambda: lambda h: h + h.mean((2, 3), keepdim=True).repeat(1, 1, *h.shape[2:]), HALF),
    "pool and view": (
        lambda: lambda h: h * F.adaptive_avg_pool2d(h, 1).view(h.shape[0], -1)[:, :, None, None],
        HALF),
    "sizes in slices": (lambda: lambda h: h[:, :, : h.shape[3] - 1], HALF),
    "flatten, unflatten": (lambda: lambda h: h.flatten(2).unflatten(2, (h.shape[2], -1)), HALF),
    "einsum": (lambda: lambda h: torch.einsum("bchw,bcwv->bchv", h, h.transpose(2, 3)), HALF),
    "matmul": (lambda: lambda h: h @ h.transpose(2, 3), HALF),
    "channels last": (lambda: lambda h: h.to(memory_format=torch.channels_last) * 2, HALF),
    "cat": (lambda: lambda h: torch.cat((h, torch.relu(h)), dim=2), HALF),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), HALF),
    "max pool with indices": (lambda: lambda h: F.max_pool2d(h, 2, return_indices=True)[0], HALF),
    "average pool, padded": (lambda: nn.AvgPool2d(3, 1, 1), HALF),
    "F.avg_pool2d, padded": (lambda: lambda h: F.avg_pool2d(h, 3, 1, 1), HALF),
    "average pool, padding not counted": (
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), HALF),
    "average pool, divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), HALF),
    "F.avg_pool2d, divisor": (lambda: lambda h: F.avg_pool2d(h, 2, divisor_override=3), HALF),
    "adaptive max pool": (lambda: nn.AdaptiveMaxPool2d(3), HALF),
    "lp pool": (lambda: nn.LPPool2d(2, 2), HALF),
    "grid sample": (lambda: grid, HALF),
    "squeeze and excitation": (Squeeze, HALF),
    "layer norm over columns": (lambda: lambda h: F.layer_norm(h, h.shape[-1:]), HALF),
}  # fmt: skip


FEW = {
    "interpolate bicubic", "zero pad", "prelu", "group norm", "instance norm, plain",
    "F.group_norm", "grouped convolution", "grouped, the same in each",
    "transposed, groups", "channel shuffle", "unfold, padded", "max", "glu", "matmul",
    "average pool, padded", "squeeze and excitation",
}  # fmt: skip
"""Those that are tried by default; the others are slow tests, for their number."""
EACH = pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)


def network(op: Any, dead: tuple[int, ...], value: float) -> nn.Module:
    """Convolution, batch norm, `op`, convolution; dead channels are `value` behind the norm."""
    torch.manual_seed(0)
    middle = op() if not isinstance(op, nn.Module) else op
    if not isinstance(middle, nn.Module):
        middle = Op(middle)
    model = nn.Sequential(
        nn.Conv2d(4, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), middle, nn.Conv2d(WIDTH, 4, 1)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        index = torch.tensor(dead)
        model.get_parameter("0.weight")[index] = 0
        model.get_parameter("0.bias")[index] = 0
        model.get_parameter("1.bias")[index] = value
    return model.eval()


def check_same(model: nn.Module, small: nn.Module) -> None:
    """Outputs agree, for images of other sizes too where the model takes them."""
    for size in ((2, 4, 8, 8), (3, 4, 12, 12), (1, 4, 8, 10)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            try:
                expected = model(x)
            except RuntimeError:
                continue  # `fold` to a size that is written down
            assert torch.allclose(small(x), expected, rtol=1e-9, atol=1e-9)


@EACH
def test_dead_channels_go_through(name: str) -> None:
    op, dead = CASES[name]
    model = network(op, dead, 0.0)
    small = mvpfx.convert(model, example_inputs=torch.randn(2, 4, 8, 8).double(), lowering="dense")
    assert small.get_parameter("0.weight").shape[0] == WIDTH - len(dead)
    check_same(model, small)


@EACH
def test_constants_stay_what_they_are(name: str) -> None:
    op, dead = CASES[name]
    model = network(op, dead, 1.25)
    small = mvpfx.convert(model, example_inputs=torch.randn(2, 4, 8, 8).double(), lowering="dense")
    check_same(model, small)


MIXING: dict[str, tuple[Callable[[], Any], str]] = {
    "layer norm": (
        lambda: lambda h: F.layer_norm(h.transpose(1, 3), (WIDTH,)).transpose(1, 3),
        "layer_norm computes over them"),
    "local response norm": (lambda: nn.LocalResponseNorm(3), "2 computes over them"),
    "softmax": (lambda: nn.Softmax(dim=1), "2 computes over them"),
    "group norm, part of a group": (lambda: nn.GroupNorm(1, WIDTH), "2 takes 8 of them at a time"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_channels_keeps_them_and_says_so(name: str) -> None:
    op, reason = MIXING[name]
    model = network(op, HALF, 0.0)
    small = mvpfx.convert(model, example_inputs=torch.randn(2, 4, 8, 8).double(), lowering="dense")
    assert small.get_parameter("0.weight").shape[0] == WIDTH
    assert f"0.weight: 4 of 8 rows are zero, but {reason}" in [
        f"{d.site}: {d.reason}" for d in mvpfx.report_of(small).decisions if not d.applied
    ]


@pytest.mark.parametrize(
    ("op", "kept"),
    [
        (lambda: nn.ConstantPad2d(1, 0.0), 8),  # zeros beside a constant
        (lambda: nn.ConstantPad2d(1, 2.0), 8),
        (lambda: nn.AvgPool2d(3, 1, 1), 8),
        (lambda: nn.MaxPool2d(3, 1, 1), 4),
        (lambda: nn.ReplicationPad2d(1), 4),
        (lambda: nn.Upsample(scale_factor=2), 4),
        (lambda: nn.InstanceNorm2d(WIDTH, affine=True), 4),
        (lambda: nn.GroupNorm(2, WIDTH), 4),
        (lambda: nn.PReLU(WIDTH), 4),
        (lambda: lambda h: h @ h.transpose(2, 3), 8),  # a sum over as many as there are columns
        (lambda: lambda h: h.sum(3, keepdim=True), 8),
    ],
)  # fmt: skip
def test_constants_are_folded_where_they_stay_constant(op: Any, kept: int) -> None:
    model = network(op, HALF, 1.25)
    small = mvpfx.convert(model, example_inputs=torch.randn(2, 4, 8, 8).double(), lowering="dense")
    assert small.get_parameter("0.weight").shape[0] == kept
    check_same(model, small)


@pytest.mark.parametrize(
    ("dims", "pad", "norm"), [
        (1, nn.ReflectionPad1d, nn.InstanceNorm1d),
        (3, nn.ZeroPad3d, nn.InstanceNorm3d),
    ],
)  # fmt: skip
def test_other_numbers_of_dimensions(dims: int, pad: Any, norm: Any) -> None:
    torch.manual_seed(0)
    conv, pool = (nn.Conv1d, nn.MaxPool1d) if dims == 1 else (nn.Conv3d, nn.MaxPool3d)
    model = nn.Sequential(
        conv(2, 8, 3), pad(1), norm(8, affine=True), conv(8, 8, 1, groups=2), pool(2), conv(8, 2, 1)
    ).eval()
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "2.bias", "3.bias"):
            model.get_parameter(name)[:4] = 0
    x = torch.randn(2, 2, *[8] * dims)
    small = mvpfx.convert(model, example_inputs=x, lowering="dense")
    assert [small.get_parameter(f"{i}.weight").shape[0] for i in (0, 2, 3)] == [4, 4, 4]
    assert small.get_submodule("3").groups == 1
    assert torch.allclose(small(x), model(x), atol=1e-5)
