"""Heads that convert cannot remove are told of when the model is prepared."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import mvpfx
from tests.models import build

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 60, "max_position_embeddings": 64,
}  # fmt: skip
HEADS: dict[str, Any] = {
    "granularity": "head", "density": 0.5, "criterion": "magnitude",
    "schedule": mvpfx.ConstantSchedule(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Bert", {}),
        ("MegatronBert", {}),
        ("RemBert", {"input_embedding_size": 16, "output_embedding_size": 16}),
        ("RoFormer", {"embedding_size": 32}),
        ("GPTNeoX", {}),
        ("StableLm", {"num_key_value_heads": 2}),
        ("Persimmon", {}),
    ],
)
def test_heads_that_prepare_takes_are_removed(kind: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**TEXT, **more)).eval()
    mvpfx.prepare(model, mvpfx.PruningConfig(**HEADS))
    ids = torch.randint(3, 60, (2, 6))
    small = mvpfx.convert(model, example_inputs={"input_ids": ids}, lowering="dense")
    assert "4 -> 2 heads" in mvpfx.explain(small) or "num_key_value_heads" in more
    with torch.no_grad():
        gap = small(ids)[0] - model(ids)[0]
    assert gap.abs().max() < 1e-5


class Config(nn.Module):
    """Attention whose number of heads stands in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], 4, -1)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(out.reshape(*x.shape[:-1], -1))


def test_heads_that_cannot_go_are_an_error() -> None:
    model, x = Config(), torch.randn(2, 5, 16)
    message = (
        'granularity "head": convert could not remove the dead heads of\n'
        "  attention.out.weight: the module's forward does not follow at view\n"
        '(one layer of each kind is listed). Use another granularity there, such as "column", '
        'leave them out, overrides={"attention.out": None}, or keep dead heads as zeros: '
        "allow_unremovable=True."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mvpfx.prepare(model, mvpfx.PruningConfig(**HEADS), example_inputs=x)
    assert not hasattr(model.attention.out, "weight_mask")
    mvpfx.prepare(model, mvpfx.PruningConfig(**HEADS, allow_unremovable=True), example_inputs=x)
    small = mvpfx.convert(model.eval(), example_inputs=x, lowering="dense")
    assert "8 of 16 columns are zero, but the module's forward does not" in mvpfx.explain(small)


def test_other_granularities_and_overrides_are_not_asked() -> None:
    model, x = Config(), torch.randn(2, 5, 16)
    config = mvpfx.PruningConfig(**HEADS, overrides={"attention.out": {"granularity": "column"}})
    mvpfx.prepare(model, config, example_inputs=x)


def test_a_model_without_inputs_is_prepared_unasked() -> None:
    mvpfx.prepare(Config(), mvpfx.PruningConfig(**HEADS))


def test_allow_unremovable_is_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"^allow_unremovable must be True or False; found 1\.$"):
        mvpfx.PruningConfig(allow_unremovable=1)  # pyright: ignore[reportArgumentType]


def test_a_trial_changes_nothing() -> None:
    model, _ = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    mvpfx.prepare(model, mvpfx.PruningConfig(granularity="head"))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)
