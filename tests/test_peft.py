"""Adapters of PEFT on prepared models, and masks under adapters: the mask covers the weight, the
adapter adds to what the masked weight computes, in whichever order they came.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.mask import Mask
from mvpfx.scheduler import refresh_weights
from mvpfx.state import state_of
from tests.trainers import PRUNED, logged, of, pruning_trainer, same_state
from tests.training import assert_equal, half, reasons, regions, shuffle_scores, step, whole
from tests.training import masks_of as all_masks
from tests.zoo import ZOO
from tests.zoo.entry import loss, output

peft: Any = pytest.importorskip("peft")

ORDERS = ("adapters first", "masks first")
TARGETS = {"BERT": ["query", "dense"], "Llama": ["q_proj", "down_proj"]}


def with_adapters(model: Any, name: str = "BERT", **options: Any) -> Any:
    """A model with adapters whose weights are not zero."""
    config = peft.LoraConfig(target_modules=TARGETS[name], r=2, **options)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_" in parameter_name and "magnitude" not in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def both(order: str, name: str = "BERT", **options: Any) -> Any:
    """A model with masks and adapters, made in the given order; scores are random and learn."""
    model = ZOO[name].model()
    if order == "adapters first":
        model = mvpfx.prepare(with_adapters(model, name, **options), half())
    else:
        model = with_adapters(mvpfx.prepare(model, half()), name, **options)
        train_scores(model)
    shuffle_scores(model)
    return model


def masks_of(model: Any) -> list[Mask]:
    """The masks of a model, their sites named as they are now."""
    state_of(model)
    return all_masks(model)


def train_scores(model: Any) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".scores"):
            parameter.requires_grad_()


def reference(model: Any, name: str = "BERT", **options: Any) -> Any:
    """Adapters alone, on weights that are zero where the masks of `model` are."""
    raw = with_adapters(ZOO[name].model(), name, **options)
    with torch.no_grad():
        for mask in masks_of(model):
            raw.get_base_model().get_parameter(mask.site.name).mul_(mask.mask())
    if options.get("use_dora"):  # the norms that DoRA starts from were taken with the raw weights
        parameters = dict(model.named_parameters())
        for parameter_name, parameter in raw.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data.copy_(parameters[parameter_name])
    return raw


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
        mvpfx.SparsityScheduler(model, total_steps=2)
    assert str(caught[0].message) == (
        "no score requires a gradient, so the masks keep the order of their first scores: PEFT "
        "freezes what is in a model when adapters are added. Add them before mvpfx.prepare, or let "
        'scores learn: for name, p in model.named_parameters(): if name.endswith(".scores"): '
        "p.requires_grad_()."
    )
    train_scores(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mvpfx.SparsityScheduler(model, total_steps=2)


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


@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_holds_weights_adapters_and_scores(order: str, tmp_path: Path) -> None:
    model, batch = both(order).eval(), ZOO["BERT"].batch(0)
    mvpfx.save_checkpoint(tmp_path / "all", model, step=1)
    other = both(order).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    mvpfx.load_checkpoint(tmp_path / "all", other)
    refresh_weights(other)
    assert torch.equal(output(other(**batch)), output(model(**batch)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_trainer_resumes_adapters_and_scores(order: str, tmp_path: Path) -> None:
    def model() -> Any:
        if order == "adapters first":
            return with_adapters(ZOO["BERT"].model())
        prepared = with_adapters(mvpfx.prepare(ZOO["BERT"].model(), PRUNED))
        train_scores(prepared)
        return prepared

    changed: dict[str, Any] = {"options": {"config": PRUNED}, "max_steps": 6, "save_steps": 3}
    changed["eval_strategy"] = "no"
    run = pruning_trainer("BERT", tmp_path, prepared=model(), **changed)
    run.train()
    other = model()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name or name.endswith(".scores"):
                parameter.zero_()
    resumed = pruning_trainer("BERT", tmp_path, prepared=other, **changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(of(run), of(resumed))
    assert logged(run, "loss") == logged(resumed, "loss")
    assert logged(run, "density") == logged(resumed, "density")
    assert logged(run, "density")[6] == pytest.approx(0.2, abs=1e-2)


def test_save_pretrained_writes_the_adapters_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    both("adapters first").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    again = peft.PeftModel.from_pretrained(
        mvpfx.prepare(ZOO["BERT"].model(), whole()), str(tmp_path)
    )
    wanted = with_adapters(ZOO["BERT"].model()).eval()
    batch = ZOO["BERT"].batch(0)
    assert_equal(output(again.eval()(**batch)), output(wanted(**batch)))
