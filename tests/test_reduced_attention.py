"""Heads of `nn.MultiheadAttention`: they go where nothing tells that they are gone."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.reduced_attention import ReducedAttention
from tests.attention_model import (
    HEAD,
    WIDTH,
    Model,
    Unmasked,
    as_double,
    converted,
    head,
    inputs,
    kill,
    outputs,
)
from tests.graphs import applied, apply, declined, linear, program_of, zero_

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


@pytest.mark.parametrize(
    ("options", "call", "masks"),
    [
        ({}, {"need_weights": False}, ""),
        ({"batch_first": True}, {}, "p"),
        ({"bias": False}, {"need_weights": False}, "a"),
        ({"kdim": 16, "vdim": 12}, {"average_attn_weights": False}, "pa"),
        ({"batch_first": True}, {"need_weights": False, "is_causal": True}, "c"),
        ({"batch_first": True, "kdim": 16, "vdim": 12}, {"is_causal": True}, "pc"),
    ],
    ids=str,
)
def test_heads_that_are_unread_or_constant_go(
    options: dict[str, Any], call: dict[str, Any], masks: str
) -> None:
    model = (Model if masks else Unmasked)(call, **options).double()
    if masks and options.get("bias", True):  # a query may attend to nothing: constants stay
        kill(model.attention, 2, None)
    kill(model.attention, constant=None if masks and options.get("bias", True) else 2)
    batch = as_double(inputs(model, masks))
    small = converted(model, batch)
    expected = outputs(model.eval(), batch)
    assert (outputs(small, batch) - expected).abs().max() <= 1e-12 * expected.abs().max()
    attention = small.attention
    assert type(attention) is ReducedAttention
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, HEAD, WIDTH)
    assert attention.out_proj.weight.shape == (WIDTH, 16)
    if "kdim" in options:
        assert attention.k_proj_weight.shape == (16, 16)
    else:
        assert attention.in_proj_weight.shape == (48, WIDTH)
    others = {**batch, "query": torch.cat([batch["query"]] * 3, int(not attention.batch_first))}
    others = {n: torch.cat([v] * 3, int(not attention.batch_first)) if n in ("key", "value") else v
              for n, v in others.items()}  # fmt: skip
    if "p" in masks:
        others["key_padding_mask"] = torch.cat([batch["key_padding_mask"]] * 3)
    assert (outputs(small, others) - outputs(model, others)).abs().max() <= 1e-12


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_more_keys_than_the_sequence_has(option: str) -> None:
    options: dict[str, Any] = {option: True}
    model = Model({}, **options).double()
    assert model.attention.in_proj_bias is not None
    kill(model.attention)
    batch = as_double(inputs(model, "pa"))
    small = converted(model, batch)
    # The values of head 2 are the bias in the sequence, and something else in the key that is more.
    assert small.attention.num_heads == 3
    with torch.no_grad():
        if option == "add_bias_kv":
            assert model.attention.bias_v is not None
            model.attention.bias_v[0, 0, head(2)] = model.attention.in_proj_bias[64:][head(2)]
        else:
            model.attention.in_proj_bias[64:][head(2)] = 0
    small = converted(model, batch)
    assert small.attention.num_heads == 2
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-12


def test_decisions_name_what_goes() -> None:
    plain = Unmasked({}, batch_first=True)
    kill(plain.attention)
    program, decisions = apply(ShrinkDims(), program_of(plain, inputs(plain)))
    assert applied(decisions) == [
        "attention.in_proj_weight: 96 x 32 -> 48 x 32",
        "attention.out_proj.weight: 32 x 32 -> 32 x 16, 8 constants folded into the bias",
        "attention: 4 -> 2 heads; returned attention probabilities lose these heads too",
    ]
    assert declined(decisions) == []
    assert "reduced_attention_forward" in str(program.graphs[""])


def test_inputs_and_results_shrink_like_those_of_linear_layers() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
            self.attention = nn.MultiheadAttention(WIDTH, 4)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.normal_(0, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.first(x))
            return self.last(self.attention(h, h, h, need_weights=False)[0])

    model = Between().double().eval()
    zero_(model.first.weight[:5])  # constants, folded into the bias of all three
    zero_(model.attention.in_proj_weight[:, 5:8])
    zero_(model.last.weight[:, :9])
    batch = {"x": torch.randn(5, 2, 6).double()}
    small = converted(model, batch)
    assert small.attention.in_proj_weight.shape == (96, 24)
    assert small.attention.out_proj.weight.shape == (23, 32)
    assert (linear(small, "first").out_features, linear(small, "last").in_features) == (24, 23)
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-12


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_are_read_belong_to_all_heads(average: bool) -> None:
    model = Model({"need_weights": True, "average_attn_weights": average})
    kill(model.attention)
    _, decisions = apply(ShrinkDims(), program_of(model, inputs(model)))
    assert applied(decisions) == []
    assert declined(decisions) == [
        "attention.in_proj_weight: 8 of 96 rows are zero, but the attention weights that are read "
        "belong to all heads",
        "attention.out_proj.weight: 8 of 32 columns are zero, but the attention weights that are "
        "read belong to all heads",
    ]


@pytest.mark.parametrize("masks", ["", "p", "a"])
def test_constant_heads_stay_where_a_query_may_attend_to_nothing(masks: str) -> None:
    model = Model({"need_weights": False}, batch_first=True)
    kill(model.attention)
    batch = inputs(model, masks)
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert "attention: 4 -> 3 heads" in applied(decisions)[-1]
    assert declined(decisions) == [
        "attention.in_proj_weight: 8 of 96 rows are zero, but a query that may attend to "
        "nothing gets 0, not their constant values"
    ]
    small = program.build(copy.deepcopy(model))
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    nothing[1] = True
    batch = {**inputs(model), "key_padding_mask": nothing}
    torch.testing.assert_close(outputs(small, batch), outputs(model, batch))


def test_a_mask_for_each_head_keeps_them() -> None:
    model = Model({"need_weights": False})
    kill(model.attention)
    batch = {**inputs(model), "attn_mask": torch.randn(8, 5, 6)}
    _, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert declined(decisions)[1] == (
        "attention.out_proj.weight: 8 of 32 columns are zero, but its mask has a matrix for each "
        "head"
    )


def test_a_part_of_a_head_stays() -> None:
    model = Model({"need_weights": False})
    zero_(model.attention.out_proj.weight[:, :3])
    _, decisions = apply(ShrinkDims(), program_of(model, inputs(model)))
    assert declined(decisions) == [
        "attention.out_proj.weight: 3 of 32 columns are zero, but heads share their width"
    ]


def test_a_function_that_is_called_with_other_weights_is_left_alone() -> None:
    class Own(Model):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Tensor) -> Tensor:
            a = self.attention
            return nn.functional.multi_head_attention_forward(
                query, key, value, WIDTH, 4, a.in_proj_weight, a.in_proj_bias, None, None, False,
                0.0, a.out_proj.weight, a.out_proj.bias, need_weights=False,
            )[0]  # fmt: skip

    model = Own()
    kill(model.attention)
    _, decisions = apply(ShrinkDims(), program_of(model, inputs(model)))
    assert applied(decisions) == []
    assert declined(decisions) == [
        "attention.in_proj_weight: 8 of 96 rows are zero, but multi_head_attention_forward is not "
        "called by an nn.MultiheadAttention",
        "attention.out_proj.weight: 8 of 32 columns are zero, but multi_head_attention_forward is "
        "not called by an nn.MultiheadAttention",
    ]


def test_unbatched_inputs() -> None:
    model = Model({"need_weights": False})
    kill(model.attention)
    batch = inputs(model)
    small = converted(model, batch)
    single = {name: value[:, 0] for name, value in batch.items()}
    torch.testing.assert_close(outputs(small, single), outputs(model, single))


@NESTED
def test_what_it_cannot_take_is_an_error() -> None:
    model = Model({"need_weights": False}, batch_first=True)
    kill(model.attention, 2, None)
    kill(model.attention, constant=None)
    batch = inputs(model)
    attention = converted(model, batch).attention
    assert repr(attention).startswith("ReducedAttention(\n  embed_dim=32, heads=2 of 8")
    message = (
        "attn_mask has 8 matrices, and a batch of 2 with the 2 heads that are left needs 4. Pass "
        "one for all heads."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**batch, attn_mask=torch.randn(8, 5, 6))
    message = "is_causal says what attn_mask holds, and needs it. Pass attn_mask too."
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**batch, is_causal=True)
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)])
    message = (
        "nested tensors are supported in self-attention without masks and weights; pad them, and "
        "pass key_padding_mask."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(x, x, x)
