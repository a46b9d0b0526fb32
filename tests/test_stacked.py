"""Experts of a mixture, held as stacked weights: each is ranked, shown and converted by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mvpfx
from mvpfx.granularity import from_matrix, matrix_shape, parse, to_matrix
from mvpfx.scheduler import masks_of
from mvpfx.site import Site
from mvpfx.state import state_of
from tests.models import loss, output

pytestmark = pytest.mark.every_model
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "head_dim": 8,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


def mixtral(implementation: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    model: Any = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    ids = torch.randint(3, 99, (2, 8))
    return model, {"input_ids": ids, "labels": ids}


def gpt_oss() -> tuple[Any, dict[str, Tensor]]:
    """Experts that are stored `[experts, in, out]`."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_local_experts=4))
    ids = torch.randint(3, 99, (2, 8))
    return model, {"input_ids": ids, "labels": ids}


def prepared(model: nn.Module, **fields: Any) -> nn.Module:
    config = mvpfx.PruningConfig(density=0.3, schedule=mvpfx.ConstantSchedule(), **fields)
    model = mvpfx.prepare(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mask in masks_of(model):
            scores = mask.require_scores()
            scores.copy_(torch.rand(scores.shape, generator=generator))
    return model


@pytest.mark.parametrize("granularity", ["element", "row", "column", (4, 8)], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "transposed"])
def test_experts_train_like_the_reference(implementation: str, granularity: Any) -> None:
    transposed = implementation == "transposed"
    raw, batch = gpt_oss() if transposed else mixtral(implementation)
    model = prepared(copy.deepcopy(raw), granularity=granularity)
    reference = copy.deepcopy(raw)
    with torch.no_grad():
        for mask in masks_of(model):
            reference.get_parameter(mask.site.name).mul_(mask.mask())
    found, wanted = loss(model(**batch)), loss(reference(**batch))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    found.backward()
    wanted.backward()
    experts = [mask for mask in masks_of(model) if mask.site.parts > 1]
    assert [mask.site.parts for mask in experts] == [4, 4]
    assert [mask.site.out_dim for mask in experts] == [2 if transposed else 1] * 2
    for mask in masks_of(model):
        gradient = reference.get_parameter(mask.site.name).grad
        own = model.get_parameter(mask.site.name)
        assert gradient is not None
        torch.testing.assert_close(own.grad, gradient * mask.mask(), rtol=1e-6, atol=1e-9)
        moved = to_matrix(gradient * own.detach(), mask.site.out_dim, mask.site.parts)
        moved = mask.granularity.reduce(moved, mask.site.parts)
        torch.testing.assert_close(mask.require_scores().grad, moved, rtol=1e-5, atol=1e-9)


def test_each_expert_keeps_its_share_in_local_scope_and_competes_in_global() -> None:
    for scope in ("local", "global"):
        model = prepared(mixtral("grouped_mm")[0], scope=scope)
        mvpfx.SparsityScheduler(model, 2)
        experts = next(mask for mask in masks_of(model) if mask.site.parts > 1)
        kept = experts.kept().view(4, -1).sum(1).tolist()
        share = round(0.3 * (experts.units // 4))
        assert (kept == [share] * 4) == (scope == "local"), kept


def test_scores_start_from_ranks_within_each_expert() -> None:
    model, _ = mixtral("grouped_mm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj") and parameter.dim() == 3:
                parameter[1] *= 100
    mvpfx.prepare(model, mvpfx.PruningConfig(score_init="magnitude"))
    mask = next(m for m in masks_of(model) if m.site.name.endswith("experts.down_proj"))
    means = mask.require_scores().view(4, -1).mean(1)
    torch.testing.assert_close(means, torch.ones(4), rtol=0.02, atol=0)


def test_tables_have_a_row_for_each_expert_and_routers_are_left_alone() -> None:
    model, batch = mixtral("grouped_mm")
    prepared(model)
    table = mvpfx.sparsity_table(model)
    small = mvpfx.convert(model, example_inputs=batch)
    for expert in range(4):
        assert f"model.layers.0.mlp.experts.gate_up_proj[{expert}] " in table
        assert f"model.layers.0.mlp.experts.down_proj[{expert}] " in mvpfx.sparsity_table(small)
    assert "model.layers.0.mlp.gate.weight" not in state_of(model).sites
    with torch.no_grad():
        torch.testing.assert_close(
            output(small(**batch)), output(model.eval()(**batch)), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("out_dim", [1, 2])
@pytest.mark.parametrize("granularity", ["element", "row", "column", (2, 3)], ids=str)
def test_units_do_not_cross_experts(granularity: Any, out_dim: int) -> None:
    shape = (3, 4, 6) if out_dim == 1 else (3, 6, 4)
    site = Site("experts", shape, out_dim, parts=3)
    weight = torch.arange(72.0).view(shape)
    matrix = to_matrix(weight, out_dim, 3)
    assert matrix.shape == matrix_shape(site) == (12, 6)
    assert torch.equal(from_matrix(matrix, shape, out_dim, 3), weight)
    parsed = parse(granularity)
    parsed.check(site)
    units = parsed.reduce(matrix, 3)
    assert units.shape == parsed.units_shape(site)
    for part, own in zip(weight, units.chunk(3), strict=True):
        assert torch.equal(parsed.reduce(to_matrix(part, out_dim - 1)), own)
    marked = parsed.expand(units, 12, 6)
    assert marked.shape == (12, 6)
