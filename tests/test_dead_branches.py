"""Branches all of which is dead: hidden dimensions of size 0 where the forward runs that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.passes.shrink_dims import ShrinkDims
from tests.dead_units import unexplained
from tests.graphs import applied, apply, assert_same, declined, outputs, program_of, zero_
from tests.models import build

X = torch.linspace(-1, 1, 40).view(2, 5, 4)


class Residual(nn.Module):
    """A gated branch beside its input."""

    def __init__(self, check: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x)
        if self.check is not None:
            self.check(hidden)
        return x + self.down(hidden)


def test_what_is_left_of_a_branch_is_its_bias() -> None:
    model = Residual()
    zero_(model.down.weight)
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == [
        "gate.weight: 8 x 4 -> 0 x 4",
        "up.weight: 8 x 4 -> 0 x 4",
        "down.weight: 4 x 8 -> 4 x 0",
    ]
    assert declined(decisions) == []
    small = assert_same(program, X, 0)
    assert torch.equal(outputs(small, X), X + model.down.bias)


def full(hidden: Tensor) -> None:
    if hidden.shape[-1] == 0:
        raise ValueError("nothing to do")


def test_one_unit_stays_where_the_forward_needs_it() -> None:
    model = Residual(full)
    zero_(model.down.weight)
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions)[-1] == "down.weight: 4 x 8 -> 4 x 1"
    assert declined(decisions) == [
        "down.weight: 4 of 4 rows are zero, but they are part of the region's result; 1 of 8 "
        "columns are zero, but the module's forward fails with what would stay: ValueError: "
        "nothing to do"
    ]
    assert_same(program, X, 0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_blocks_of_transformers(name: str, tmp_path: Path) -> None:
    model, batch = build(name)
    block = {"bert": "bert.encoder.layer.0", "llama": "model.layers.0"}[name]
    last = {"bert": "output.dense", "llama": "mlp.down_proj"}[name]
    zero_(model.get_parameter(f"{block}.{last}.weight"))
    small = mvpfx.convert(model.eval(), example_inputs=batch, lowering="dense")
    weight = small.get_parameter(f"{block}.{last}.weight")
    assert weight.shape == (32, 0)
    assert torch.equal(outputs(small, batch), outputs(model, batch))
    assert f"{block}.{last}.weight" in mvpfx.sparsity_table(small)
    assert "+ store as reduced: nothing of it is left" in mvpfx.explain(small)
    assert unexplained(small) == []
    again = mvpfx.load(mvpfx.save(small, tmp_path / "small"))
    assert torch.equal(outputs(again, batch), outputs(small, batch))


def test_a_view_that_cannot_count_nothing_keeps_one_unit() -> None:
    model, batch = build("gpt2")
    zero_(model.get_parameter("transformer.h.0.mlp.c_proj.weight"))
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions)[-1] == "transformer.h.0.mlp.c_proj.weight: 128 x 32 -> 1 x 32"
    assert "but the sizes in view cannot be written for what would stay" in declined(decisions)[0]
    assert_same(program, batch, 0)


def test_all_heads_of_torchs_attention() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x)[0]

    model = Attending()
    zero_(model.attention.out_proj.weight)
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == [
        "attention.in_proj_weight: 12 x 4 -> 0 x 4",
        "attention.out_proj.weight: 4 x 4 -> 4 x 0",
        "attention: 2 -> 0 heads; returned attention probabilities lose these heads too",
    ]
    small = assert_same(program, X, 0)
    (out, weights) = small.get_submodule("attention")(X, X, X)
    assert torch.equal(out, model.attention.out_proj.bias.expand_as(X))
    assert torch.equal(weights, torch.zeros(2, 5, 5))
