"""Coupling: which weights share hidden channels, as graphs show."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.channel_unit import ChannelUnit
from mvpfx.config import PruningConfig
from mvpfx.mask import Mask
from tests.models import build
from tests.toy_masks import raises
from tests.training import half, masks_of
from tests.zoo import ZOO

BATCH = torch.arange(24.0).view(3, 8) / 24


def units(model: nn.Module, batch: Any = BATCH) -> dict[str, ChannelUnit]:
    """What hidden channels have of the sites of a model, prepared by channels."""
    config = half(granularity="hybrid")
    prepared = mvpfx.prepare(model, config, example_inputs=batch)
    masks = [m for m in prepared.modules() if isinstance(m, Mask)]
    return {m.site.name: m.site.channel for m in masks if m.site.channel is not None}


def of_first_block(found: dict[str, ChannelUnit], block: str) -> dict[str, tuple[Any, ...]]:
    """Rows, copies and columns by the last names of the weights of one block."""
    inside = {n: u for n, u in found.items() if f".{block}." in f".{n}"}
    names = {n: ".".join(n.split(".")[-3:-1]) for n in inside}
    assert {names[u.group] for u in inside.values()} <= set(names.values())
    return {names[n]: (u.rows, u.copies, u.cols) for n, u in inside.items()}


MADE, READ = (1, 1, None), (None, 1, 1)
"""One row, or one column, of a channel."""


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("bert", "layer.0", {"intermediate.dense": MADE, "output.dense": READ}),
        ("distilbert", "layer.0", {"ffn.lin1": MADE, "ffn.lin2": READ}),
        ("gpt2", "h.0", {"mlp.c_fc": MADE, "mlp.c_proj": READ}),
        (
            "llama",
            "layers.0",
            {"mlp.gate_proj": MADE, "mlp.up_proj": MADE, "mlp.down_proj": READ},
        ),
        ("ModernBERT", "layers.0", {"mlp.Wi": (1, 2, None), "mlp.Wo": READ}),
    ],
)
def test_ffn_pairs(name: str, block: str, expected: dict[str, tuple[Any, ...]]) -> None:
    model, batch = (ZOO[name].model(), ZOO[name].batch(0)) if name in ZOO else build(name)
    assert of_first_block(units(model, batch), block) == expected


def test_every_block_has_a_group_of_its_own() -> None:
    model, batch = build("bert")
    groups = {unit.group for unit in units(model, batch).values()}
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert groups == {name.format(0), name.format(1)}


def test_a_weight_is_in_one_group() -> None:
    sizes = (8, 12, 10, 6, 4, 2)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    found = units(model)
    assert {n: u.group for n, u in found.items()} == {
        "0.weight": "2.weight",
        "2.weight": "2.weight",
        "4.weight": "6.weight",
        "6.weight": "6.weight",
    }


def test_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )
    found = units(model, torch.rand(2, 3, 8, 8))
    assert found == {
        "0.weight": ChannelUnit("5.weight", 1, 1, None),
        "3.weight": ChannelUnit("5.weight", 1, 1, None),
        "5.weight": ChannelUnit("5.weight", None, 1, 9),
    }


class Branching(nn.Module):
    """A hidden state that two layers read; `kind` says what happens to it before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.left, self.right = nn.Linear(8, 12), nn.Linear(12, 5), nn.Linear(12, 7)
        self.fused, self.norm = nn.Linear(8, 24), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.gelu(self.up(x))
        if self.kind == "norm":
            h = self.norm(h)
        if self.kind == "interleaved":
            gate, value = self.fused(x).view(len(x), 12, 2).unbind(-1)
            h = h * F.silu(gate) * value
        elif self.kind == "reversed":
            h = h + self.fused(x)[:, :12].flip(-1)
        shown = h if self.kind == "shown" else self.fused(x)
        return self.left(h), self.right(h), shown


def test_all_that_read_a_channel_are_in_its_group() -> None:
    assert units(Branching("plain")) == {
        "up.weight": ChannelUnit("left.weight", 1, 1, None),
        "left.weight": ChannelUnit("left.weight", None, 1, 1),
        "right.weight": ChannelUnit("left.weight", None, 1, 1),
    }


def test_rows_that_lie_side_by_side() -> None:
    class Interleaved(Branching):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *super().forward(x)[:2], x

    found = units(Interleaved("interleaved"))
    assert found["fused.weight"] == ChannelUnit("left.weight", 2, 1, None)
    assert found["up.weight"] == ChannelUnit("left.weight", 1, 1, None)


@pytest.mark.parametrize("kind", ["norm", "shown", "reversed"])
def test_what_cannot_go_is_not_coupled(kind: str) -> None:
    assert units(Branching(kind)) == {}


def test_tied_weights_are_not_coupled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    assert set(units(model)) == set()


def test_reasons_are_recorded() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    mvpfx.prepare(model, PruningConfig(granularity="channel"), example_inputs=BATCH)
    text = mvpfx.explain(model)
    assert "  - site: no other weight makes or reads the same hidden channels" in text
    assert "  + insert mask: scored with 2.weight, channel by channel" in text
    assert "kept as in 2.weight" in text


def test_without_inputs() -> None:
    with raises(
        ValueError,
        'Sequential: granularity "channel" and "hybrid" score the hidden channels that weights '
        "share, which shows when it is called. Pass one batch to mvpfx.prepare as example_inputs=.",
    ):
        mvpfx.prepare(nn.Sequential(nn.Linear(2, 2)), PruningConfig(granularity="hybrid"))


@pytest.mark.parametrize("name", ["ViT", "CLIP"])
def test_models_that_take_no_token_ids_alone(name: str) -> None:
    model: Any = ZOO[name].model()
    with raises(
        ValueError,
        f'{type(model).__name__}: granularity "channel" and "hybrid" score the hidden channels '
        "that weights share, which shows when it is called. Pass one batch to mvpfx.prepare as "
        "example_inputs=.",
    ):
        mvpfx.prepare(model, PruningConfig(granularity="hybrid"))


@pytest.mark.parametrize("name", ["Llama", pytest.param("T5", marks=pytest.mark.slow)])
def test_language_models_have_inputs_of_their_own(name: str) -> None:
    model = mvpfx.prepare(ZOO[name].model(), half(granularity="hybrid"))
    assert any(mask.leader is not None for mask in masks_of(model))


def test_nothing_to_couple() -> None:
    with raises(
        ValueError,
        "Sequential has no two weights of which one reads the hidden channels that the other "
        'makes, so granularity "channel" leaves no site. Use another granularity, such as "row".',
    ):
        config = PruningConfig(granularity="channel")
        mvpfx.prepare(nn.Sequential(nn.Linear(8, 8)), config, example_inputs=BATCH)


def test_an_override_for_a_site_without_channels() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    config = PruningConfig(overrides={"4": {"granularity": "channel"}})
    with raises(
        ValueError,
        "4.weight has no hidden channels: no graph shows another weight whose rows go with its "
        'columns, or the other way round. Use another granularity there, such as "row", or leave '
        'the site out: overrides={"4": None}',
    ):
        mvpfx.prepare(model, config, example_inputs=BATCH)


class Split(nn.Module):
    """A projection in unequal parts, some of which feed other layers, as in Mamba."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = parts
        self.x, self.out = nn.Linear(16, sum(parts)), nn.Linear(8, 3)
        self.ups = nn.ModuleList(nn.Linear(part, 8) for part in parts[:-1])

    def forward(self, a: Tensor) -> Tensor:
        *first, rest = self.x(a).split(self.parts, -1)
        hidden = sum(up(part).relu() for up, part in zip(self.ups, first, strict=True))
        return self.out(hidden * rest.mean(-1, keepdim=True))


@pytest.mark.parametrize("granularity", ["channel", "hybrid"])
@pytest.mark.parametrize("parts", [(4, 16), (4, 4, 8), (16, 4), (3, 5, 2), (6, 6)])
def test_a_projection_split_unequally(parts: tuple[int, ...], granularity: str) -> None:
    torch.manual_seed(0)
    model, x = Split(parts), torch.randn(5, 16)
    config = half(granularity=granularity)
    mvpfx.prepare(model, config, example_inputs=x)
    wanted = model.eval()(x)
    small = mvpfx.convert(model, example_inputs=x, lowering="dense")
    torch.testing.assert_close(small(x), wanted)
    out: Any = small.get_submodule("out")
    assert out.in_features < 8
