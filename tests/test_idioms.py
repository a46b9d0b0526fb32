"""Norms, rotations and activations are known by what they compute, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mvpfx.kernels.idioms import find_gate, find_rms_norm, find_rotation
from mvpfx.torch_private import FakeTensorMode

Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of a weight, activations, cosines and sines."""


class Weighted(nn.Module):
    """What `compute` makes of its inputs and a weight of 8 features."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.compute = compute

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return self.compute(self.weight, x, cosine, sine)


def last(compute: Compute) -> fx.Node:
    """The node that computes the result, with fake values on all nodes."""
    traced = fx.symbolic_trace(Weighted(compute))
    table = torch.rand(1, 4, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(traced, mode).propagate(torch.rand(2, 4, 4, 8), table, table)
    (output,) = traced.graph.find_nodes(op="output")
    found = output.args[0]
    assert isinstance(found, fx.Node)
    return found


NORMS: dict[str, Compute] = {
    "weight first": lambda w, x, c, s: (
        w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    ),
    "weight last": lambda w, x, c, s: x * torch.rsqrt(x.pow(2).mean([-1], keepdim=True) + 1e-6) * w,
    "cast": lambda w, x, c, s: w * _normed(x.to(torch.float32)).to(torch.float64),
    "weight and one": lambda w, x, c, s: (_normed(x.float()) * (1.0 + w.float())).type_as(x),
    "one and a weight": lambda w, x, c, s: (w + 1) * _normed(x),
}
OTHERS: dict[str, Compute] = {
    "another dimension": lambda w, x, c, s: w * x * torch.rsqrt(x.pow(2).mean(2, True) + 1e-6),
    "no keepdim": lambda w, x, c, s: w * (x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + 1e-6)),
    "a cube": lambda w, x, c, s: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)),
    "of something else": lambda w, x, c, s: w * (x * torch.rsqrt(_variance(-x) + 1e-6)),
    "a root": lambda w, x, c, s: w * (x * torch.sqrt(_variance(x) + 1e-6)),
    "no epsilon": lambda w, x, c, s: w * (x * torch.rsqrt(_variance(x))),
    "no weight": lambda w, x, c, s: x * (x * torch.rsqrt(_variance(x) + 1e-6)),
    "less a weight": lambda w, x, c, s: (1 - w) * (x * torch.rsqrt(_variance(x) + 1e-6)),
    "two weights": lambda w, x, c, s: (w + w) * (x * torch.rsqrt(_variance(x) + 1e-6)),
    "no product": lambda w, x, c, s: w + (x * torch.rsqrt(_variance(x) + 1e-6)),
}


def _variance(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(_variance(x) + 1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_rms_norms(name: str) -> None:
    found = find_rms_norm(last(NORMS[name]))
    assert found is not None
    assert (found.x.name, found.weight.name, found.epsilon) == ("x", "weight", 1e-6)
    assert found.shift == (1.0 if "one" in name else 0.0)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rms_norm(name: str) -> None:
    assert find_rms_norm(last(OTHERS[name])) is None


def _halves(x: Tensor, low: int = 4) -> Tensor:
    return torch.cat((-x[..., low:], x[..., :low]), dim=-1)


ROTATIONS: dict[str, Compute] = {
    "as in Llama": lambda w, x, c, s: x * c.unsqueeze(1) + _halves(x) * s.unsqueeze(1),
    "the other way": lambda w, x, c, s: s.unsqueeze(1) * _halves(x) + c.unsqueeze(1) * x,
    "cast": lambda w, x, c, s: (
        x.float() * c.unsqueeze(1) + _halves(x.float().float()) * s.unsqueeze(1)
    ).to(torch.float32),
}
OTHER_SUMS: dict[str, Compute] = {
    "heads elsewhere": lambda w, x, c, s: x * c.unsqueeze(2) + _halves(x) * s.unsqueeze(2),
    "unequal parts": lambda w, x, c, s: x * c.unsqueeze(1) + _halves(x, 3) * s.unsqueeze(1),
    "no sign": lambda w, x, c, s: (
        x * c.unsqueeze(1) + torch.cat((x[..., 4:], x[..., :4]), dim=-1) * s.unsqueeze(1)
    ),
    "not swapped": lambda w, x, c, s: (
        x * c.unsqueeze(1) + torch.cat((-x[..., :4], x[..., 4:]), dim=-1) * s.unsqueeze(1)
    ),
    "of something else": lambda w, x, c, s: x * c.unsqueeze(1) + _halves(-x) * s.unsqueeze(1),
    "a difference": lambda w, x, c, s: x * c.unsqueeze(1) - _halves(x) * s.unsqueeze(1),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name: str) -> None:
    found = find_rotation(last(ROTATIONS[name]))
    assert found is not None
    assert (found.x.name, found.cosine.name, found.sine.name) == ("x", "cosine", "sine")


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_what_is_no_rotation(name: str) -> None:
    assert find_rotation(last(OTHER_SUMS[name])) is None


ROOT = math.sqrt(2 / math.pi)
GATES: dict[str, tuple[str, Compute]] = {
    "as in GPT-2": (
        "gelu_tanh",
        lambda w, x, c, s: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "another order": (
        "gelu_tanh",
        lambda w, x, c, s: (torch.tanh((x.pow(3) * 0.044715 + x) * ROOT) + 1) * (x * 0.5),
    ),
    "as in CLIP": ("gelu_quick", lambda w, x, c, s: x * torch.sigmoid(1.702 * x)),
    "sigmoid first": ("silu", lambda w, x, c, s: torch.sigmoid(x) * x),
}
OTHER_PRODUCTS: dict[str, Compute] = {
    "no half": lambda w, x, c, s: x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * x.pow(3)))),
    "two": lambda w, x, c, s: 0.5 * x * (2.0 + torch.tanh(ROOT * (x + 0.044715 * x.pow(3)))),
    "a square": lambda w, x, c, s: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * x.pow(2)))),
    "another share": lambda w, x, c, s: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.05 * x.pow(3)))),
    "another root": lambda w, x, c, s: 0.5 * x * (1.0 + torch.tanh(x + 0.044715 * x.pow(3))),
    "of something else": lambda w, x, c, s: x * torch.sigmoid(1.702 * w),
    "another slope": lambda w, x, c, s: x * torch.sigmoid(1.7 * x),
    "twice": lambda w, x, c, s: (2 * x) * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    activation, compute = GATES[name]
    found = find_gate(last(compute))
    assert found is not None
    assert (found.x.name, found.activation) == ("x", activation)


@pytest.mark.parametrize("name", OTHER_PRODUCTS)
def test_what_is_no_gate(name: str) -> None:
    assert find_gate(last(OTHER_PRODUCTS[name])) is None
