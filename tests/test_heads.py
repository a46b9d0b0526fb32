"""Heads: the second half of what shrink_dims removes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx.dims.attention import UNATTENDED
from mvpfx.passes.shrink_dims import ShrinkDims
from tests.graphs import applied, apply, assert_same, declined, linear, program_of, zero_
from tests.models import build
from tests.zoo.entry import output

ENCODERS = {
    "bert": (
        "bert.encoder.layer.0.attention.self.{}",
        "bert.encoder.layer.0.attention.output.dense",
    ),
    "roberta": (
        "roberta.encoder.layer.0.attention.self.{}",
        "roberta.encoder.layer.0.attention.output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.0.attention.{}",
        "distilbert.transformer.layer.0.attention.out_lin",
    ),
    "vit": ("vit.layers.0.attention.{}", "vit.layers.0.attention.o_proj"),
}


def projections(name: str, model: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """The query, key, value and output layers of the first block."""
    prefix, out = ENCODERS[name]
    short = {"bert": "{}", "roberta": "{}", "distilbert": "{}_lin", "vit": "{}_proj"}[name]
    names = ("query", "key", "value") if short == "{}" else ("q", "k", "v")
    modules = [linear(model, prefix.format(short.format(n))) for n in names]
    return modules[0], modules[1], modules[2], linear(model, out)


def head(index: int, width: int = 8) -> slice:
    return slice(index * width, (index + 1) * width)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_dead_heads_go(name: str) -> None:
    model, batch = build(name)
    _, _, value, out = projections(name, model)
    zero_(value.weight[head(1)])  # values are zero, so their average is
    assert value.bias is not None
    zero_(value.bias[head(1)])
    zero_(out.weight[:, head(3)])  # nobody reads this head
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    texts = [text for text in applied(decisions) if "heads" in text]
    assert [text.partition(": ")[2] for text in texts] == ["4 -> 2 heads"]
    small = assert_same(program, batch)
    query, key, value, out = projections(name, small)
    assert {query.out_features, key.out_features, value.out_features, out.in_features} == {16}
    counts = ("num_heads", "num_attention_heads", "n_heads")
    owners = [m for m in small.modules() if any(getattr(m, c, None) == 2 for c in counts)]
    assert len(owners) == 1


@pytest.mark.parametrize("name", list(ENCODERS))
def test_constant_values_stay_where_a_mask_may_hide_all(name: str) -> None:
    model, batch = build(name)
    _, _, value, _ = projections(name, model)
    zero_(value.weight[head(1)])
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert [text for text in applied(decisions) if "heads" in text] == []
    reasons = [text.partition(": ")[2] for text in declined(decisions)]
    assert f"8 of 32 rows are zero, but {UNATTENDED}" in reasons
    small = assert_same(program, batch)
    if "attention_mask" in batch:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0] = 0
        with torch.no_grad():
            gap = output(small(**batch)) - output(model(**batch))
        assert gap.abs().max() <= 1e-5


@pytest.mark.parametrize("part", [0, 1])
def test_an_empty_query_or_key_is_uniform_attention_and_stays(part: int) -> None:
    model, batch = build("bert")
    layer = projections("bert", model)[part]
    zero_(layer.weight[head(0)])
    assert layer.bias is not None
    zero_(layer.bias[head(0)])
    _, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions) == []


def test_one_head_always_stays() -> None:
    model, batch = build("bert")
    zero_(projections("bert", model)[3].weight)
    program, _ = apply(ShrinkDims(), program_of(model, batch))
    small = assert_same(program, batch)
    assert projections("bert", small)[3].in_features == 8


class SelfAttention(nn.Module):
    """Attention on plain torch, with grouped queries and a view that may hold literals."""

    def __init__(self, literal: bool = False, groups: int = 4, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(4, 16, bias=bias), nn.Linear(16, 4, bias=bias)
        self.k, self.v = nn.Linear(4, groups * 4, bias=bias), nn.Linear(4, groups * 4, bias=bias)
        self.literal = literal

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], 4 if self.literal else -1, 4)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        grouped = self.k.out_features != self.q.out_features
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return self.o(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


TOKENS = torch.linspace(-1, 1, 40).view(2, 5, 4)


def test_torchs_own_attention_and_grouped_queries() -> None:
    model = SelfAttention(groups=2)
    zero_(model.v.weight[4:])
    zero_(model.o.weight[:, :4])  # one of two query heads of the first group
    program, decisions = apply(ShrinkDims(), program_of(model, TOKENS))
    assert applied(decisions) == [
        "q.weight: 16 x 4 -> 8 x 4",
        "k.weight: 8 x 4 -> 4 x 4",
        "v.weight: 8 x 4 -> 4 x 4",
        "o.weight: 4 x 16 -> 4 x 8, 8 constants folded into the bias",
        ": 4 -> 2 heads",
    ]
    small = assert_same(program, TOKENS)
    assert linear(small, "k").out_features == 4


def test_a_literal_head_count_is_declined() -> None:
    model = SelfAttention(literal=True)
    zero_(model.o.weight[:, :4])
    program, decisions = apply(ShrinkDims(), program_of(model, TOKENS))
    assert applied(decisions) == []
    (reason,) = declined(decisions)
    assert reason.startswith("o.weight: 4 of 16 columns are zero, but the module's forward fails")
    assert program.parameters == {}
