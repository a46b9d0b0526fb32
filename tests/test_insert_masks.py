"""Insert masks: one node a site, before its matmuls only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Normed(nn.Module):
    """A weight that is multiplied by and whose norm is taken; rows of another are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.table = nn.Linear(4, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        norm = self.linear.weight.float().norm(dim=1)
        return self.linear(x) / norm + self.table(F.embedding(ids, self.table.weight))


def test_a_norm_is_taken_of_the_masked_weight_and_rows_are_looked_up_in_the_raw_one() -> None:
    batch = (torch.randn(3, 4), torch.tensor([2]))
    model = mvpfx.prepare(Normed(), mvpfx.PruningConfig(density=0.5), example_inputs=batch)
    text = graph_text(mvpfx.graphs(model)[""].graph)
    assert "%float_1 = .float(%linear_weight_mask)" in text
    assert "embedding(%a1, %table_weight," in text
    assert "%linear_1 = linear(%embedding, %table_weight_mask, %table_bias)" in text


def test_a_norm_is_the_same_with_a_graph_and_without() -> None:
    model = mvpfx.prepare(Normed(), mvpfx.PruningConfig(density=0.5, overrides={"table": None}))
    mvpfx.SparsityScheduler(model, total_steps=1).step()
    batch = (torch.randn(3, 4), torch.tensor([2]))
    captured = model(*batch)
    model.get_submodule("linear").register_forward_hook(lambda *_: None)  # pyright: ignore[reportUnknownLambdaType]
    assert torch.equal(model(*batch), captured)
    assert "has forward hooks (1 call ran its own forward)" in mvpfx.explain(model)


def test_a_second_run_decides_nothing() -> None:
    program = masked("bert")
    again, (record,) = run((InsertMasks(),), program)
    assert not record.modified and not record.decisions
    assert again.modules == program.modules
