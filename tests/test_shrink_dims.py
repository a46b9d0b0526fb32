import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.program import graph_text
from tests.graphs import applied, apply, assert_same, declined, linear, mlp, program_of, zero_
from tests.models import build

X = torch.linspace(-2, 2, 20).view(5, 4)


def test_a_dead_row_folds_its_constant_into_the_next_bias() -> None:
    model = mlp(nn.GELU())
    zero_(linear(model, "0").weight[::2])
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == [
        "0.weight: 8 x 4 -> 4 x 4",
        "2.weight: 3 x 8 -> 3 x 4, 4 constants folded into the bias",
    ]
    small = assert_same(program, X)
    assert [tuple(p.shape) for p in small.parameters()] == [(4, 4), (4,), (3, 4), (3,)]
    assert (linear(small, "0").out_features, linear(small, "2").in_features) == (4, 4)
    assert (
        tuple(next(n for n in program.graphs[""].nodes if n.op == "call_module").meta["val"].shape)[
            -1
        ]
        == 4
    )


def test_a_zero_column_kills_its_producers_row_and_so_on_backwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    zero_(linear(model, "4").weight[:, :3])
    zero_(linear(model, "2").weight[3:, :2])  # dies once rows 0-2 are gone
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == [
        "0.weight: 6 x 4 -> 4 x 4",
        "2.weight: 5 x 6 -> 2 x 4",
        "4.weight: 2 x 5 -> 2 x 2",
    ]
    assert_same(program, X)


def test_a_bias_is_created_where_a_constant_needs_one() -> None:
    model = mlp(nn.Sigmoid(), bias=False)
    zero_(linear(model, "0").weight[:2])
    program, _ = apply(ShrinkDims(), program_of(model, X))
    assert graph_text(program.graphs[""]) == (
        "%a0 = placeholder\n"
        "%_0_weight = get_attr[0.weight]\n"
        "%_0_bias = get_attr[0.bias]\n"
        "%linear = linear(%a0, %_0_weight, %_0_bias)\n"
        "%_1 = call_module[1](%linear)\n"
        "%_2_weight = get_attr[2.weight]\n"
        "%_2_bias = get_attr[2.bias]\n"
        "%linear_1 = linear(%_1, %_2_weight, %_2_bias)\n"
        "return (%linear_1)"
    )
    small = assert_same(program, X)
    assert small.get_parameter("2.bias").requires_grad


def test_a_branch_that_is_dead_is_its_bias() -> None:
    model = mlp(nn.ReLU())
    zero_(linear(model, "0").weight)
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    small = assert_same(program, X)
    assert linear(small, "0").weight.shape == (0, 4)
    assert linear(small, "2").weight.shape == (3, 0)
    assert declined(decisions) == []


class Block(nn.Module):
    """A feed-forward block whose forward is given by the test."""

    def __init__(self, forward: Any, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(4, 8, bias=bias), nn.Linear(4, 8, bias=bias)
        self.down = nn.Linear(8, 4, bias=bias)
        self.w1 = nn.Parameter(torch.randn(4, 8))
        self.b1 = nn.Parameter(torch.randn(8))
        self.w2 = nn.Parameter(torch.randn(8, 4))
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def gated(m: Block, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def test_gated_block_needs_only_one_zero_factor() -> None:
    model = Block(gated, bias=False)
    zero_(model.gate.weight[:3])
    zero_(model.up.weight[2:5])
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == [
        "gate.weight: 8 x 4 -> 3 x 4",
        "up.weight: 8 x 4 -> 3 x 4",
        "down.weight: 4 x 8 -> 4 x 3",
    ]
    assert_same(program, X)


def test_gated_block_with_biases_needs_both_constant() -> None:
    model = Block(gated)
    zero_(model.gate.weight[:4])
    zero_(model.up.weight[2:6])
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions)[-1].startswith("down.weight: 4 x 8 -> 4 x 6, 2 constants folded")
    assert_same(program, X)


def test_functional_matmuls_shrink_with_their_bias_vector() -> None:
    def forward(m: Block, x: Tensor) -> Tensor:
        return torch.relu(x @ m.w1 + m.b1) @ m.w2

    model = Block(forward)
    with torch.no_grad():
        model.w1[:, :3] = 0
        model.b1[:3] = torch.tensor([-1.0, 0.0, 2.0])  # relu leaves 2.0: no bias can take it
    program, decisions = apply(ShrinkDims(), program_of(model, X, sites=[]))
    assert applied(decisions) == ["w1: 4 x 8 -> 4 x 6", "w2: 8 x 4 -> 6 x 4"]
    assert declined(decisions) == [
        "w1: 1 of 8 rows are zero, but they are constant, not zero, and no bias can take them"
    ]
    small = assert_same(program, X)
    assert small.get_parameter("b1").shape == (6,)


def dropout_in_training(m: Block, x: Tensor) -> Tensor:
    return m.down(F.dropout(m.up(x), 0.0, training=True))


def returned(m: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.relu(m.up(x))
    return m.down(hidden), hidden


def used_twice(m: Block, x: Tensor) -> Tensor:
    return m.down(torch.relu(m.up(m.down(torch.relu(m.up(x))))))


def normed(m: Block, x: Tensor) -> Tensor:
    return m.down(F.layer_norm(m.up(x), (8,)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (dropout_in_training, "dropout is not known to keep dimensions apart"),
        (returned, "they are part of the region's result"),
        (normed, "layer_norm computes over them"),
    ],
)
def test_declined_with_the_reason(forward: Any, reason: str) -> None:
    model = Block(forward)
    zero_(model.down.weight[:, :3])
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == []
    assert declined(decisions) == [f"down.weight: 3 of 8 columns are zero, but {reason}"]
    assert program.parameters == {}


def test_a_weight_that_is_used_twice_loses_what_both_uses_can_do_without() -> None:
    model = Block(used_twice)
    zero_(model.down.weight[:, 0])
    program, decisions = apply(ShrinkDims(), program_of(model, X))
    assert applied(decisions) == ["up.weight: 8 x 4 -> 7 x 4", "down.weight: 4 x 8 -> 4 x 7"]
    assert_same(program, X)


def test_a_tied_weight_is_left_alone() -> None:
    def forward(m: Block, x: Tensor) -> Tensor:
        return m.down(torch.relu(m.up(x)))

    model = Block(forward)
    model.gate.weight = model.up.weight
    zero_(model.down.weight[:, 0])
    _, decisions = apply(ShrinkDims(), program_of(model, X))
    assert declined(decisions) == [
        "down.weight: 1 of 8 columns are zero, but up.weight is tied to gate.weight"
    ]


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    ],
)
def test_feed_forward_of_decoders(name: str, up: str, down: str) -> None:
    model, batch = build(name)
    weight = model.get_parameter(f"{up}.weight")
    dim = 1 if name == "gpt2" else 0
    zero_(weight.narrow(dim, 0, 10))
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    width = weight.shape[dim]
    gone = {"gpt2": "128 x 32 -> 118 x 32", "llama": "32 x 48 -> 32 x 38"}[name]
    assert applied(decisions)[-1].startswith(f"{down}.weight: {gone}")
    small = assert_same(program, batch)
    assert math.prod(small.get_parameter(f"{down}.weight").shape) == 32 * (width - 10)


@pytest.mark.parametrize(("multiple", "kept"), [(1, 13), (4, 16), (8, 16), (32, 32), (64, 48)])
def test_sizes_are_rounded_up_with_dead_channels(multiple: int, kept: int) -> None:
    model, batch = build("llama")
    zero_(model.get_parameter("model.layers.0.mlp.up_proj.weight")[13:])
    program, _ = apply(ShrinkDims(multiple_of=multiple), program_of(model, batch))
    small = assert_same(program, batch)
    assert small.get_parameter("model.layers.0.mlp.up_proj.weight").shape == (kept, 32)


def test_a_multiple_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match="multiple_of must be at least 1; found 0"):
        mvpfx.convert(mlp(nn.ReLU()), multiple_of=0)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_beside_padding_is_none(padding: int) -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(4, 2, 3, padding=padding, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), second)
    first = model.get_submodule("0")
    zero_(first.get_parameter("weight")[:2])
    with torch.no_grad():
        first.get_parameter("bias")[:2] = torch.tensor([-1.0, 2.0])  # relu leaves 2.0
    program, decisions = apply(ShrinkDims(), program_of(model, torch.randn(1, 3, 5, 5)))
    reason = "they are constant, not zero, and padding puts zeros beside them"
    kept = f"0.weight: 1 of 4 rows are zero, but {reason}"
    assert declined(decisions) == ([kept] if padding else [])
    assert_same(program, torch.randn(2, 3, 5, 5))
    folded = "2 x 3 x 3 x 3" if padding else "2 x 2 x 3 x 3, 1 constants folded into the bias"
    assert applied(decisions)[-1] == f"2.weight: 2 x 4 x 3 x 3 -> {folded}"


def test_a_functional_convolution_without_bias_takes_no_constants() -> None:
    def forward(m: Block, x: Tensor) -> Tensor:
        return F.conv1d(torch.relu(F.conv1d(x, m.w1, m.b1)), m.w2)

    model = Block(forward)
    model.w1, model.w2 = nn.Parameter(torch.randn(8, 4, 1)), nn.Parameter(torch.randn(4, 8, 1))
    zero_(model.w1[:3])
    with torch.no_grad():
        model.b1[:3] = torch.tensor([-1.0, 0.0, 2.0])
    x = X.view(1, 4, 5)
    program, decisions = apply(ShrinkDims(), program_of(model, x, sites=[]))
    assert applied(decisions) == ["w1: 8 x 4 x 1 -> 6 x 4 x 1", "w2: 4 x 8 x 1 -> 4 x 6 x 1"]
    assert declined(decisions) == [
        "w1: 1 of 8 rows are zero, but they are constant, not zero, and no bias can take them"
    ]
    assert_same(program, x)
