"""Heads whose scores get something of their own: biases by distance, slopes, temperatures."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import mvpfx

HEADS, WIDTH = 4, 4


class Biased(nn.Module):
    """Attention with `how` it adds to its scores, one thing for each head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.heads = how, HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in "qkvo")
        self.table = nn.Embedding(19, HEADS)
        self.rows = nn.Parameter(torch.randn(19, HEADS))
        self.slopes = nn.Buffer(torch.randn(HEADS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.whole = nn.Parameter(torch.randn(HEADS, 6, 6))

    def bias(self, size: int) -> Tensor:
        places = torch.arange(size)
        distance = places[None] - places[:, None] + 9
        if self.how == "embedding":
            return self.table(distance).permute(2, 0, 1)[None]
        if self.how == "rows":
            return self.rows[distance].permute(2, 0, 1)
        if self.how == "flat rows":
            return self.rows[distance.view(-1)].view(size, size, -1).permute(2, 0, 1).unsqueeze(0)
        if self.how == "whole":
            return self.whole
        return self.slopes.view(-1, 1, 1) * distance.to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.heads, WIDTH)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "cosine":
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
            scores = scores * self.temperature.clamp(max=2.0).exp()
        elif self.how.startswith("mask"):
            bias = self.rows[:6].t()[..., None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, -1, 6))
            return self.o(out.transpose(1, 2).flatten(2))
        else:
            scores = q @ k.transpose(-1, -2) + self.bias(x.shape[1])
        out = F.softmax(scores, -1) @ v
        return self.o(out.transpose(1, 2).reshape(*x.shape[:-1], self.heads * WIDTH))


@pytest.mark.parametrize(
    "how", ["embedding", "rows", "flat rows", "whole", "slopes", "cosine", "mask"]
)
def test_heads_go_with_what_they_add_to_their_scores(how: str) -> None:
    model, x = Biased(how).eval(), torch.randn(2, 6, 16)
    with torch.no_grad():
        model.o.weight[:, 4:12] = 0
    small: Any = mvpfx.convert(model, example_inputs=x, lowering="dense")
    assert small.o.weight.shape == (16, 8)
    assert small.heads == 2
    torch.testing.assert_close(small(x), model(x))
    sizes = {"embedding": small.table.weight, "rows": small.rows, "flat rows": small.rows,
             "mask": small.rows}  # fmt: skip
    if how in sizes:
        assert sizes[how].shape[1] == 2


SWIN: dict[str, Any] = {
    "image_size": 8, "patch_size": 1, "embed_dim": 16, "depths": [2], "num_heads": [4],
    "window_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_windows(kind: str) -> None:
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**SWIN)).eval()
    outs = [n for n, _ in model.named_modules() if n.endswith(("o_proj", "attention.output.dense"))]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_table" in name:
                parameter.normal_()
        for i, name in enumerate(outs):
            weight = model.get_parameter(f"{name}.weight")
            weight.view(16, 4, 4)[:, i : i + 3] = 0
    x = {"pixel_values": torch.randn(2, 3, 8, 8)}
    small = mvpfx.convert(model, example_inputs=x, lowering="dense")
    assert [small.get_parameter(f"{name}.weight").shape[1] for name in outs] == [4, 4]
    with torch.no_grad():
        torch.testing.assert_close(small(**x)[0], model(**x)[0])


TEXT: dict[str, Any] = {"vocab_size": 40, "num_layers": 2, "num_heads": 4}
SHARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5": ("T5EncoderModel", {**TEXT, "d_model": 16, "d_kv": 4, "d_ff": 32}, "SelfAttention.o"),
    "MPNet": (
        "MPNetModel",
        {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16,
         "intermediate_size": 32, "max_position_embeddings": 40},
        "attn.o",
    ),
    "Mpt": ("MptModel", {"vocab_size": 40, "d_model": 16, "n_heads": 4, "n_layers": 2}, "out_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHARED))
def test_layers_that_share_biases_lose_heads_of_their_own(name: str, tmp_path: Path) -> None:
    kind, sizes, out = SHARED[name]
    torch.manual_seed(0)
    model = getattr(hf, kind)(getattr(hf, f"{name}Config")(**sizes)).eval()
    outs = [n for n, _ in model.named_modules() if n.endswith(out)]
    with torch.no_grad():
        for i, layer in enumerate(outs):
            weight = model.get_parameter(f"{layer}.weight")
            weight.view(16, 4, 4)[:, i : i + 2] = 0
    ids = torch.randint(3, 40, (2, 7))
    small = mvpfx.convert(model, example_inputs={"input_ids": ids}, lowering="dense")
    assert [small.get_parameter(f"{layer}.weight").shape[1] for layer in outs] == [8, 8]
    loaded = mvpfx.load(mvpfx.save(small, tmp_path / "small"))
    copies = [small, loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    other = {"input_ids": torch.randint(3, 40, (3, 9)), "attention_mask": mask}
    with torch.no_grad():
        for again in copies:
            for batch in ({"input_ids": ids}, other, {"input_ids": ids[:1, :1]}):
                torch.testing.assert_close(again(**batch)[0], model(**batch)[0])
