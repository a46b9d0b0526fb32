"""Encoders of torch some of whose attentions lost heads: fast path, training, files, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.reduced_attention import ReducedAttention
from tests.attention_model import (
    WIDTH,
    Model,
    converted,
    inputs,
    kill,
    outputs,
)

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, 2).eval()
    kill(model.layers[1].self_attn)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter != 0) * 0.3)
    return model


@NESTED
def test_an_encoder_whose_first_layer_takes_the_fast_path() -> None:
    model = encoder()
    batch = {"src": torch.randn(3, 7, WIDTH)}
    small = converted(model, batch)
    assert type(small.layers[0].self_attn) is nn.MultiheadAttention
    assert type(small.layers[1].self_attn) is ReducedAttention
    batch["src_key_padding_mask"] = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        torch.testing.assert_close(small(**batch), model(**batch), rtol=0, atol=2e-6)
    with torch.enable_grad():
        found, expected = small(**batch), model(**batch)
    kept = ~batch["src_key_padding_mask"]
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=2e-6)


def test_dropout_of_attention_weights_stays() -> None:
    model = encoder(dropout=0.4)
    small = converted(model, {"src": torch.randn(3, 7, WIDTH)})
    attention, x = small.layers[1].self_attn, torch.randn(2, 5, WIDTH)
    for need_weights in (False, True):
        attention.train()
        torch.manual_seed(1)
        first, weights = attention(x, x, x, need_weights=need_weights)
        torch.manual_seed(2)
        second, _ = attention(x, x, x, need_weights=need_weights)
        assert not torch.equal(first, second)
        attention.eval()
        torch.testing.assert_close(
            attention(x, x, x, need_weights=need_weights)[0],
            attention(x, x, x, need_weights=not need_weights)[0],
        )
    assert weights is not None
    assert bool((weights == 0).any())


def test_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    model, batch = encoder(), {"src": torch.randn(3, 7, WIDTH)}
    small = converted(model, batch)
    again = mvpfx.load(mvpfx.save(small, tmp_path / "small"), encoder())
    assert type(again.get_submodule("layers.1.self_attn")) is ReducedAttention
    assert torch.equal(outputs(again, batch), outputs(small, batch))
    plain = Model({"need_weights": False}).attention
    kill(plain, constant=None)
    kill(plain, 2, None)
    batch = inputs(Model())
    program = mvpfx.convert(plain, example_inputs={**batch, "need_weights": False})
    assert program.num_heads == 2
    loaded = mvpfx.load(mvpfx.save(program, tmp_path / "root"), Model().attention)
    assert type(loaded) is ReducedAttention


def test_exported_and_compiled_as_any_other_layer() -> None:
    model, batch = encoder(), {"src": torch.randn(3, 7, WIDTH)}
    small = converted(model, batch)
    exported = torch.export.export(small, (batch["src"],)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(batch["src"]), small(**batch))
