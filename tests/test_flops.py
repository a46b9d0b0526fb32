"""FLOPs against sums by hand: two for each multiplication with its addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.flops import count_flops
from tests.models import build

X = torch.ones(5, 8)


def test_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    flops = count_flops(model, X)
    assert flops.total == 2 * 5 * 8 * 6 + 2 * 5 * 6 * 3
    assert flops.by_parameter["0.weight"] == flops.by_module["0"] == 2 * 5 * 8 * 6
    assert flops.by_parameter["2.weight"] == 2 * 5 * 6 * 3


def test_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    flops = count_flops(model, torch.ones(2, 3, 6, 6))
    assert flops.total == 2 * 2 * 4 * 4 * 4 * (3 * 9) == flops.by_parameter["0.weight"]


def test_attention_in_its_module() -> None:
    model, batch = build("bert")
    flops = count_flops(model, batch)
    tokens, hidden, heads, width = 16, 32, 4, 8
    scores_and_average = 2 * 2 * (2 * heads * 8 * 8 * width)
    inside = flops.by_module["bert.encoder.layer.0.attention"]
    assert inside == 4 * 2 * tokens * hidden * hidden + scores_and_average


def test_multihead_attention_is_no_blind_spot() -> None:
    model, batch = build("attention")
    flops = count_flops(model, batch)
    assert set(flops.by_parameter) >= {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_stacked_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("th,enh->ten", x, self.weight)

    assert count_flops(Experts(), X).by_parameter["weight"] == 2 * 5 * 8 * 6 * 3


def test_a_weight_that_is_used_twice() -> None:
    model, batch = build("twice")
    flops = count_flops(model, batch)
    once = 2 * flops.by_module["shared"] // 2
    assert flops.by_parameter["shared.weight"] == once > 0


@pytest.mark.parametrize("storage", ["csr", "bsr"])
def test_sparse_weights_count_their_values(storage: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight")[32:] = 0
    small = mvpfx.convert(
        nn.Sequential(model[0], nn.ReLU()), example_inputs=torch.ones(5, 64), lowering=storage
    )
    assert count_flops(small, torch.ones(5, 64)).total == 2 * 5 * 32 * 64


def test_functions_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up)

    assert count_flops(Functional(), X).by_parameter == {"up": 2 * 5 * 8 * 6}
