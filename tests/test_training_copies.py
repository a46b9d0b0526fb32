"""Copies, files and averages of prepared models."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mvpfx
from tests.training import (
    assert_equal,
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    regions,
    shuffle_scores,
    step,
)
from tests.zoo import ZOO
from tests.zoo.entry import Batch, loss, output

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "GPT-2", "Llama", "T5", "ViT", "tied weights"]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    saved,
]
COPIED = pytest.mark.parametrize("copied", WAYS, ids=["deepcopy", "pickle", "torch.save"])


@COPIED
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT"])
def test_a_copy_is_trained_on_its_own(
    name: str, called: bool, copied: Callable[[Any], Any]
) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    twin = copied(prepared)
    assert type(twin) is type(prepared)
    assert list(twin.state_dict()) == list(prepared.state_dict())
    before = {n: t.clone() for n, t in prepared.state_dict().items()}
    assert_same_step(twin, raw, batch)
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(twin, lr=1.0, score_lr=1.0))
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in twin.state_dict().items())
    assert all(torch.equal(p, before[n]) for n, p in prepared.state_dict().items())
    assert all(p.grad is None for p in prepared.parameters())
    raw.zero_grad()
    assert_same_step(prepared, raw, batch)


@COPIED
def test_a_copy_keeps_its_place_in_the_schedule(copied: Callable[[Any], Any]) -> None:
    model = ZOO["BERT"].model()
    schedule = mvpfx.LinearSchedule(warmup=0, cooldown=0)
    mvpfx.prepare(model, mvpfx.PruningConfig(density=0.2, schedule=schedule))
    shuffle_scores(model)
    scheduler = mvpfx.SparsityScheduler(model, total_steps=4)
    scheduler.step()
    twin = copied(model)
    assert [m.density for m in masks_of(twin)] == [m.density for m in masks_of(model)]
    scheduler.step()
    assert [m.density for m in masks_of(twin)] != [m.density for m in masks_of(model)]
    later = mvpfx.SparsityScheduler(twin, total_steps=4)
    later.load_state_dict(scheduler.state_dict())
    for found, wanted in zip(masks_of(twin), masks_of(model), strict=True):
        assert torch.equal(found.mask(), wanted.mask())


def test_masks_ranked_together_stay_together_in_a_copy() -> None:
    model, batch = ZOO["BERT"].model(), ZOO["BERT"].batch(0)
    mvpfx.prepare(model, half(scope="global")).eval()
    shuffle_scores(model)
    for copied in WAYS:
        twin = copied(model)
        first, *others = masks_of(twin)
        with torch.no_grad():
            first.require_scores().fill_(-1.0)
        assert first.density_now == 0.0
        total = sum(mask.units for mask in masks_of(twin))
        kept = sum(int(mask.kept().sum()) for mask in others)
        assert kept == round(0.5 * total)
        twin(**batch)


def moved(model: nn.Module, other: nn.Module, **options: Any) -> Any:
    return other.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, **options)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_round(name: str, called: bool, assign: bool) -> None:
    entry = ZOO[name]
    batch = entry.batch(0)
    source = mvpfx.prepare(entry.model(), half()).eval()
    shuffle_scores(source)
    target = mvpfx.prepare(entry.model(), half()).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.normal_()
    if called:
        target(**batch)
        source(**batch)
    assert not any(moved(source, target, strict=True, assign=assign))
    if assign:  # which unties weights, in any model
        tie(target, like=source)
    assert_equal(output(target(**batch)), output(source(**batch)))
    for found, wanted in zip(masks_of(target), masks_of(source), strict=True):
        assert torch.equal(found.mask(), wanted.mask())
    gradients(target, batch, source)


def tie(model: nn.Module, like: nn.Module) -> None:
    first: dict[int, nn.Parameter] = {}
    for name, parameter in like.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        tied = first.setdefault(id(parameter), model.get_parameter(name))
        setattr(model.get_submodule(owner), leaf, tied)


def gradients(found: nn.Module, batch: Batch, wanted: nn.Module) -> None:
    for model in (found, wanted):
        loss(model(**batch)).backward()
    parameters = dict(wanted.named_parameters())
    for name, parameter in found.named_parameters():
        assert_equal(parameter.grad, parameters[name].grad, name)


def test_weights_of_an_unprepared_model_load_with_the_scores_missing() -> None:
    raw, batch = ZOO["BERT"].model().eval(), ZOO["BERT"].batch(0)
    prepared = mvpfx.prepare(ZOO["BERT"].model(), half()).eval()
    result = prepared.load_state_dict(raw.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == [f"{m.site.name}_mask.scores" for m in masks_of(prepared)]
    back = raw.load_state_dict(prepared.state_dict(), strict=False)
    assert not back.missing_keys
    of_masks = [name for name in back.unexpected_keys if not name.endswith("_mask.progress")]
    assert sorted(of_masks) == sorted(result.missing_keys)
    raw(**batch)


def test_weights_written_into_the_state_dict_are_seen() -> None:
    raw, prepared, batch = masked_pair("BERT")
    for model in (raw, prepared):
        model.eval()
        model(**batch)
        for name, tensor in model.state_dict().items():
            if name.endswith("dense.weight"):
                tensor.mul_(2.0)
    assert_equal(output(prepared(**batch)), output(raw(**batch)))


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_averages_of_models(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    averages: list[Any] = []
    for model in (raw, prepared):
        model.eval()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for scale in (1.0, 1.1, 0.7):
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if not parameter_name.endswith("scores"):
                        parameter.mul_(scale)
            average.update_parameters(model)
        averages.append(average)
    ours = masks_of(averages[1])
    assert len(ours) == len(masks_of(prepared)) > 0
    assert_equal(output(averages[1](**batch)), output(averages[0](**batch)))
    with torch.no_grad():
        ours[0].require_scores().neg_()
    assert not torch.equal(ours[0].mask(), masks_of(prepared)[0].mask())
    assert mvpfx.explain(averages[1])


def test_averages_of_scores_move_the_masks() -> None:
    _, prepared, batch = masked_pair("BERT")
    average = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.25))
    average.update_parameters(prepared)
    average(**batch)
    shuffled: list[Tensor] = []
    with torch.no_grad():
        for mask in masks_of(prepared):
            scores = mask.require_scores()
            shuffled.append(0.25 * scores + 0.75 * (1 - scores))
            scores.copy_(1 - scores)
    average.update_parameters(prepared)
    for mask, wanted in zip(masks_of(average), shuffled, strict=True):
        torch.testing.assert_close(mask.require_scores(), wanted)
        lowest_kept = wanted[mask.kept()].min()
        assert lowest_kept >= wanted[~mask.kept()].max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["convolutions", "nn.TransformerEncoder"])
def test_jit_trace_keeps_the_masks(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    raw.eval()
    prepared.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(prepared, example_kwarg_inputs=batch, check_trace=False)
    assert_equal(output(traced(**batch)), output(raw(**batch)))


def test_a_copy_has_graphs_of_its_own() -> None:
    _, prepared, batch = masked_pair("Llama")
    step(prepared, batch)
    twin = copy.deepcopy(prepared)
    assert all(region.calls == 0 and not region.variants for region in regions(twin))
    step(twin, batch)
    assert all(region.calls == 1 for region in regions(twin))
    assert all(region.calls == 1 for region in regions(prepared))
