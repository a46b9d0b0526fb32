"""Adapters of PEFT on prepared models, and masks under adapters: the mask covers the weight, the
adapter adds to what the masked weight computes, in whichever order they came.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.scheduler import refresh_weights
from tests.adapters import (
    ORDERS,
    TARGETS,
    both,
    masks_of,
    peft,
    reference,
    train_scores,
    with_adapters,
)
from tests.training import assert_equal, half, reasons, regions, shuffle_scores, step
from tests.zoo import ZOO
from tests.zoo.entry import loss, output


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("order", ORDERS)
def test_one_step_equals_adapters_on_masked_weights(
    order: str, name: str, options: dict[str, Any]
) -> None:
    model, batch = both(order, name, **options), ZOO[name].batch(0)
    raw = reference(model, name, **options)
    found, wanted = step(model, batch), step(raw, batch)
    assert_equal(output(found), output(wanted))
    parameters = dict(model.named_parameters())
    for parameter_name, parameter in raw.named_parameters():
        assert_equal(parameters[parameter_name].grad, parameter.grad, parameter_name)
    assert all(mask.require_scores().grad is not None for mask in masks_of(model))
    assert not reasons(model) and all(region.calls == 1 for region in regions(model))


@pytest.mark.parametrize("order", ORDERS)
def test_sites_are_the_weights_and_never_the_adapters(order: str) -> None:
    model = both(order)
    names = [mask.site.name for mask in masks_of(model)]
    plain = mvpfx.prepare(ZOO["BERT"].model(), half())
    assert [name.replace(".base_layer", "") for name in names] == [
        mask.site.name for mask in masks_of(plain)
    ]
    table = mvpfx.sparsity_table(model)
    assert all(name in table for name in names) and "lora_" not in table


def test_explain_says_why_adapters_are_left_alone() -> None:
    model = both("adapters first")
    lines = mvpfx.explain(model).splitlines()
    at = lines.index("bert.encoder.layer.0.attention.self.query.lora_A.default.weight")
    wanted = "  - site: it belongs to an adapter, which adds to what the masked weight computes"
    assert lines[at + 1] == wanted


def test_an_override_prunes_an_adapter_too() -> None:
    adapted = with_adapters(ZOO["BERT"].model())
    model = mvpfx.prepare(adapted, half(overrides={"re:.*layer.0.*lora_B.default": {}}))
    masked = [mask.site.name for mask in masks_of(model) if "lora_" in mask.site.name]
    assert len(masked) == 4 and all("layer.0." in name for name in masked)


def test_adapters_of_a_plain_module_are_left_alone_when_a_graph_shows_them() -> None:
    model = mvpfx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), half())
    mvpfx.SparsityScheduler(model, total_steps=2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    adapted(torch.ones(1, 4))
    assert [m.site.name for m in masks_of(adapted)] == ["0.base_layer.weight", "1.weight"]
    assert mvpfx.sparsity_table(adapted).count("lora") == 0


def test_a_scheduler_warns_that_peft_froze_the_scores() -> None:
    model = with_adapters(mvpfx.prepare(ZOO["BERT"].model(), half()))
    with pytest.warns(UserWarning, match="no score requires a gradient") as caught:
        mvpfx.SparsityScheduler(model, total_steps=300)
    assert str(caught[0].message) == (
        "no score requires a gradient, so the masks keep the order of their first scores: PEFT "
        "freezes what is in a model when adapters are added. Add them before mvpfx.prepare, or let "
        'scores learn: for name, p in model.named_parameters(): if name.endswith(".scores"): '
        "p.requires_grad_()."
    )
    train_scores(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no score requires a gradient")
        mvpfx.SparsityScheduler(model, total_steps=300)


@pytest.mark.parametrize("order", ORDERS)
def test_groups_hold_adapters_and_scores_only(order: str) -> None:
    model = both(order)
    groups = {group["name"]: group["params"] for group in mvpfx.parameter_groups(model, lr=1e-3)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(groups) == {"weights", "scores"}
    assert all(".lora_" in names[id(p)] for p in groups["weights"])
    assert len(groups["scores"]) == len(masks_of(model))


@pytest.mark.parametrize("order", ORDERS)
def test_density_and_masks_move_while_weights_stay(order: str) -> None:
    model, batch = ZOO["BERT"].model(), ZOO["BERT"].batch(0)
    config = mvpfx.PruningConfig(density=0.25, schedule=mvpfx.LinearSchedule())
    if order == "adapters first":
        model = mvpfx.prepare(with_adapters(model), config)
    else:
        model = with_adapters(mvpfx.prepare(model, config))
        train_scores(model)
    scheduler = mvpfx.SparsityScheduler(model, total_steps=4)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3))
    kept = {n: p.clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    for _ in range(4):
        loss(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.density == 0.25
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    assert all(bool(mask.require_scores().detach().any()) for mask in masks_of(model))


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_switched_off_leave_the_masked_model(order: str) -> None:
    model, batch = both(order).eval(), ZOO["BERT"].batch(0)
    on, raw = model(**batch), reference(model).eval()
    with model.disable_adapter(), raw.disable_adapter():
        off = model(**batch)
        assert_equal(output(off), output(raw(**batch)))
    assert not torch.equal(output(on), output(off))
    assert torch.equal(output(model(**batch)), output(on))


@pytest.mark.parametrize("order", ORDERS)
def test_another_scale_of_an_adapter_is_seen_after_capture(order: str) -> None:
    model, batch = both(order).eval(), ZOO["BERT"].batch(0)
    raw = reference(model).eval()
    before = output(model(**batch))
    for each in (model, raw):
        for module in each.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)
    after = output(model(**batch))
    assert not torch.equal(after, before)
    assert_equal(after, output(raw(**batch)))


@pytest.mark.parametrize("order", ORDERS)
def test_merging_puts_the_adapter_under_the_mask(order: str) -> None:
    model, batch = both(order).eval(), ZOO["BERT"].batch(0)
    masks = {m.site.name.replace(".base_layer", ""): m.mask().clone() for m in masks_of(model)}
    raw = with_adapters(ZOO["BERT"].model()).merge_and_unload().eval()
    with torch.no_grad():
        for name, mask in masks.items():
            raw.get_parameter(name).mul_(mask)
    merged = model.merge_and_unload()
    refresh_weights(merged)
    assert_equal(output(merged(**batch)), output(raw(**batch)))
    assert [mask.site.name for mask in masks_of(merged)] == list(masks)
    table = mvpfx.sparsity_table(merged)
    assert "base_layer" not in table and all(name in table for name in masks)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("order", ORDERS)
def test_convert_keeps_adapters_beside_the_lowered_weight(
    order: str, options: dict[str, Any]
) -> None:
    model, batch = both(order, **options).eval(), ZOO["BERT"].batch(0)
    small = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    assert_equal(output(small(**batch)), output(model(**batch)))
    rows = {row.site: row.storage for row in mvpfx.report_of(small).rows}
    assert rows["bert.encoder.layer.0.attention.self.key.weight"] == "csr"
    assert rows["bert.encoder.layer.0.attention.self.query.lora_A.default.weight"] == "csr"


def test_convert_refuses_what_adds_to_the_inputs() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = mvpfx.prepare(peft.get_peft_model(ZOO["Llama"].model(), config), half())
    with pytest.raises(ValueError) as caught:
        mvpfx.convert(model)
    assert str(caught.value) == (
        "PeftModelForCausalLM holds a prepared LlamaForCausalLM and may compute more than it. "
        "Convert the prepared model itself."
    )


def test_prompt_tuning_learns_on_masked_weights() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    batch = ZOO["Llama"].batch(0)
    torch.manual_seed(0)
    raw = peft.get_peft_model(ZOO["Llama"].model(), config)
    model = mvpfx.prepare(copy.deepcopy(raw), half())
    shuffle_scores(model)
    with torch.no_grad():
        for mask in masks_of(model):
            raw.get_base_model().get_parameter(mask.site.name).mul_(mask.mask())
    found, wanted = step(model, batch), step(raw, batch)
    assert_equal(output(found), output(wanted))
    parameters = dict(model.named_parameters())
    for name, parameter in raw.named_parameters():
        if parameter.requires_grad:
            assert_equal(parameters[name].grad, parameter.grad, name)
