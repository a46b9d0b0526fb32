"""Insert masks: one node a site, before its matmuls only."""

from __future__ import annotations

import mvpfx
from mvpfx.passes.capture import Capture
from mvpfx.passes.find_sites import FindSites
from mvpfx.passes.insert_masks import InsertMasks
from mvpfx.pipeline import run
from mvpfx.program import Program, graph_text
from tests.models import build


def masked(name: str) -> Program:
    model, batch = build(name)
    passes = (Capture(batch), FindSites(mvpfx.PruningConfig()), InsertMasks())
    return run(passes, Program(model))[0]


def test_golden_one_mask_node_for_two_uses() -> None:
    assert graph_text(masked("twice").graphs[""]).splitlines() == [
        "%a0 = placeholder",
        "%shared_weight = get_attr[shared.weight]",
        "%shared_weight_mask = call_module[shared.weight_mask](%shared_weight)",
        "%shared_bias = get_attr[shared.bias]",
        "%linear = linear(%a0, %shared_weight_mask, %shared_bias)",
        "%relu = relu(%linear, inplace=False)",
        "%linear_1 = linear(%relu, %shared_weight_mask, %shared_bias)",
        "%head_weight = get_attr[head.weight]",
        "%head_weight_mask = call_module[head.weight_mask](%head_weight)",
        "%head_bias = get_attr[head.bias]",
        "%linear_2 = linear(%linear_1, %head_weight_mask, %head_bias)",
        "return (%linear_2)",
    ]


def test_an_embedding_lookup_keeps_the_raw_weight() -> None:
    text = graph_text(masked("tied").graphs[""])
    assert "call_module[embedding](%a0)" in text
    assert "call_module[out.weight_mask](%embedding_weight)" in text


def test_the_mask_comes_before_a_chain() -> None:
    lines = graph_text(masked("functional_mlp").graphs[""]).splitlines()
    assert "%flipped_mask = call_module[flipped_mask](%flipped)" in lines
    assert "%t = .t(%flipped_mask)" in lines


def test_a_second_run_decides_nothing() -> None:
    program = masked("bert")
    again, (record,) = run((InsertMasks(),), program)
    assert not record.modified and not record.decisions
    assert again.modules == program.modules
