"""Heads as units: found without a graph, scored once each, and gone as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.head_unit import HeadUnit
from mvpfx.site import Site
from mvpfx.weights import layer_sites
from tests.toy_masks import raises
from tests.training import masks_of
from tests.zoo import ZOO

FROM_HEADS = {
    "BERT": "attention.output.dense",
    "DistilBERT": "attention.out_lin",
    "ALBERT": "attention.dense",
    "DeBERTa-v2": "attention.output.dense",
    "ModernBERT": "attn.Wo",
    "GPT-2": "attn.c_proj",
    "Llama": "self_attn.o_proj",
    "Falcon-H1": "self_attn.o_proj",
    "T5": "Attention.o",
    "Whisper": "attn.out_proj",
    "ViT": "attention.o_proj",
    "Qwen2.5-VL": ("attn.proj", "attn.o_proj"),
    "nn.Transformer": "attn.out_proj",
}


def attention(name: str) -> dict[str, Site]:
    """Sites of the first attention of a model, by what follows its name."""
    sites = [site for site in layer_sites(ZOO[name].model()) if site.head is not None]
    first = sites[0].head
    assert first is not None
    return {
        site.name.removeprefix(f"{first.attention}."): site
        for site in sites
        if site.head is not None and site.head.attention == first.attention
    }


@pytest.mark.parametrize("name", FROM_HEADS)
def test_each_head_has_one_score_where_its_output_is_read(name: str) -> None:
    kept = name in ("DeBERTa-v2", "T5")  # dead heads stay in these
    config = mvpfx.PruningConfig(granularity="head", density=0.5, allow_unremovable=kept)
    model = mvpfx.prepare(ZOO[name].model(), config)
    masks = masks_of(model)
    assert masks
    for mask in masks:
        assert mask.site.module_name.endswith(FROM_HEADS[name])
        assert mask.require_scores().shape == (1, 4)
        mask.density = 0.5
        whole = mask.mask() if mask.site.out_dim == 0 else mask.mask().t()
        heads = whole.unflatten(1, (4, -1))
        assert torch.equal(heads.any(2).any(0), mask.kept()[0])
        assert torch.equal(heads.all(2).all(0), mask.kept()[0])


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("BERT", {"query": 4, "key": 4, "value": 4}),
        ("GPT-2", {"c_attn": 12}),
        ("T5", {"q": 4, "k": 4, "v": 4}),
        ("Llama", {"q_proj": 4, "k_proj": 2, "v_proj": 2}),
        ("nn.MultiheadAttention", {"in_proj_weight": 12}),
    ],
)
def test_projections_to_heads_have_their_rows(name: str, names: dict[str, int]) -> None:
    sites = attention(name)
    found = {part: site for part, site in sites.items() if site.head and site.head.rows}
    assert {part.removesuffix(".weight").split(".")[-1] for part in found} == set(names)
    for part, site in found.items():
        assert site.head is not None and site.head.cols is None
        count = names[part.removesuffix(".weight").split(".")[-1]]
        assert site.shape[site.out_dim] == count * (site.head.rows or 0)


def test_what_is_no_projection_has_no_heads() -> None:
    sites = {site.name: site.head for site in layer_sites(ZOO["BERT"].model())}
    assert sites["bert.encoder.layer.0.intermediate.dense.weight"] is None
    assert sites["bert.encoder.layer.0.output.dense.weight"] is None
    assert sites["bert.encoder.layer.0.attention.output.dense.weight"] == HeadUnit(
        "bert.encoder.layer.0.attention", None, 8
    )


def prepared(**fields: Any) -> Any:
    return mvpfx.prepare(ZOO["BERT"].model(), mvpfx.PruningConfig(**fields))


def test_projections_to_heads_follow_the_one_from_them() -> None:
    model = prepared(overrides={"re:.*attention.*": {"granularity": "head"}})
    by_head = [m.site.name for m in masks_of(model) if m.rule.granularity.head]
    assert by_head == [f"bert.encoder.layer.{i}.attention.output.dense.weight" for i in (0, 1)]
    assert not [m for m in masks_of(model) if m.site.name.endswith("query.weight")]
    text = str(mvpfx.explain(model))
    assert "its heads are scored where their outputs are read, and go as a whole" in text
    assert "it has no attention heads" not in text


def test_they_are_scored_themselves_where_it_is_not() -> None:
    query = "bert.encoder.layer.0.attention.self.query"
    model = prepared(overrides={query: {"granularity": "head"}})
    mask = next(m for m in masks_of(model) if m.site.name.endswith("0.attention.self.query.weight"))
    assert mask.require_scores().shape == (4, 1)


def test_other_sites_are_declined_with_the_reason() -> None:
    text = str(mvpfx.explain(prepared(granularity="head")))
    assert "it has no attention heads" in text
    assert "head" in mvpfx.sparsity_table(prepared(granularity="head"))


def test_errors() -> None:
    message = (
        "bert.encoder.layer.0.intermediate.dense.weight is no projection of an attention whose "
        'number of heads is known, so it has no heads. Use another granularity there, such as "row"'
        ', or leave the site out: overrides={"bert.encoder.layer.0.intermediate.dense": None}'
    )
    with raises(ValueError, message):
        prepared(overrides={"bert.encoder.layer.0.intermediate": {"granularity": "head"}})
    message = (
        "Sequential has no attention whose number of heads is known, so granularity "
        '"head" leaves no site. Use another granularity, such as "row".'
    )
    with raises(ValueError, message):
        mvpfx.prepare(nn.Sequential(nn.Linear(4, 4)), mvpfx.PruningConfig(granularity="head"))
