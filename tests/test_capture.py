"""Capture: which calls become graphs, and what they return."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mvpfx
from mvpfx.passes.capture import Capture
from mvpfx.pipeline import run
from mvpfx.program import Program, graph_text
from mvpfx.region import Region, region_of
from tests.models import build
from tests.test_traps import masked_copy, prepared


def captured(model: nn.Module, inputs: Any) -> tuple[Program, list[str]]:
    program, (record,) = run((Capture(inputs),), Program(model))
    return program, [str(decision) for decision in record.decisions]


def test_golden() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    program, decisions = captured(model, torch.zeros(3, 4))
    assert graph_text(program.graphs[""]).splitlines() == [
        "%a0 = placeholder",
        "%_0_weight = get_attr[0.weight]",
        "%_0_bias = get_attr[0.bias]",
        "%linear = linear(%a0, %_0_weight, %_0_bias)",
        "%_1 = call_module[1](%linear)",
        "%_2_weight = get_attr[2.weight]",
        "%_2_bias = get_attr[2.bias]",
        "%linear_1 = linear(%_1, %_2_weight, %_2_bias)",
        "return (%linear_1)",
    ]
    assert decisions == ["+ : capture: 9 nodes"]
    assert program.tokens == {"0.weight": 3, "2.weight": 3}


def test_decline_names_the_reason() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.mean() > 0 else self.b(x)

    program, decisions = captured(Branches(), torch.ones(2, 4))
    assert not program.graphs
    assert decisions == ["- : capture: no graph: its control flow depends on data"]


def test_without_inputs_nothing_is_run() -> None:
    program, decisions = captured(nn.Linear(4, 4), None)
    assert not program.graphs
    assert decisions == ["- : capture: no graph: it was not called yet"]


@pytest.mark.parametrize(
    ("name", "regions"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier"]),
        ("llama", ["model.layers.0", "model.layers.1", "lm_head"]),
        ("mlp", [""]),
    ],
)
def test_regions_are_the_outermost_repeated_blocks(name: str, regions: list[str]) -> None:
    model, batch = build(name)
    program, _ = captured(model.eval(), batch)
    assert program.regions == regions
    assert list(program.graphs) == regions


def test_sizes_of_one_and_new_sizes_are_right() -> None:
    raw, _ = build("bert")
    model = prepared(copy.deepcopy(raw)).eval()
    reference = masked_copy(raw, model).eval()
    for batch, length in ((2, 8), (1, 8), (3, 1), (1, 1), (4, 16), (2, 32)):
        ids = torch.randint(3, 99, (batch, length))
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-6)
    region = region_of(model.get_submodule("bert.encoder.layer.0"))
    assert region is not None and not region.declined


def test_generate_with_cache_equals_reference() -> None:
    for name in ("llama_cached", "gpt2"):
        raw, batch = build(name)
        model: Any = prepared(copy.deepcopy(raw)).eval()
        reference: Any = masked_copy(raw, model).eval()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(found, reference.generate(ids, attention_mask=mask, **options))


def test_too_many_kinds_of_call_fall_back() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
            return self.layer(x) * count

    model = prepared(Counted())
    x = torch.randn(2, 4)
    one = model(x, 1)
    for count in range(2, 40):
        torch.testing.assert_close(model(x, count), one * count)
    region = region_of(model)
    assert isinstance(region, Region) and region.calls == 32
    assert list(region.declined) == ["more than 32 kinds of call"]


def test_checkpointing_inside_a_region_falls_back() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    raw = Inside()
    model = prepared(copy.deepcopy(raw))
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), masked_copy(raw, model)(x))
    assert "activation checkpointing inside the region" in mvpfx.explain(model)
