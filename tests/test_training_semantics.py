"""What people switch on and off while they train, with and without masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from tests.training import (
    Pair,
    assert_equal,
    assert_same_gradients,
    assert_same_step,
    masked_pair,
    masks_of,
    pair,
    regions,
    step,
)
from tests.zoo.entry import loss, output

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "GPT-2", "Llama", "T5", "ViT"]
MAKERS = pytest.mark.parametrize("make", [pair, masked_pair], ids=["all ones", "half"])
Make = Callable[[str], Pair]


@MAKERS
@pytest.mark.parametrize("name", NAMES)
def test_train_and_eval_in_turns(name: str, make: Make) -> None:
    raw, prepared, batch = make(name)
    for training in (True, False, True, False):
        for model in (raw, prepared):
            model.zero_grad()
            model.train(training)
        assert_same_step(prepared, raw, batch)
    assert any(region.calls for region in regions(prepared))


@pytest.mark.parametrize("name", NAMES)
def test_parts_in_eval_mode(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    dropouts = [n for n, m in raw.named_modules() if isinstance(m, nn.Dropout)]
    for model in (raw, prepared):
        model.train()
        for part in dropouts[::2]:
            model.get_submodule(part).eval()
    assert_same_step(prepared, raw, batch)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_draws_the_same_and_leaves_the_generator_where_it_was(name: str) -> None:
    raw, prepared, batch = pair(name)
    states: list[Tensor] = []
    for model in (raw, prepared):
        model.train()
        outputs = [output(step(model, batch, seed)) for seed in (1, 2, 1)]
        states.append(torch.get_rng_state())
        if name != "Llama" and name != "ViT":  # these have no dropout by default
            assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(*states)


def test_dropout_changed_after_the_first_call_counts() -> None:
    raw, prepared, batch = masked_pair("BERT")
    for rate in (0.1, 0.5, 0.0):
        for model in (raw, prepared):
            model.train()
            model.zero_grad()
            for part in model.modules():
                if isinstance(part, nn.Dropout):
                    part.p = rate
                if hasattr(part, "dropout_prob"):
                    part.dropout_prob = rate  # pyright: ignore[reportArgumentType]
        assert_same_step(prepared, raw, batch)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_micro_batches_add_up_and_masks_wait_for_the_optimizer(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    micro = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    before = [mask.mask().clone() for mask in masks_of(prepared)]
    for model in (raw, prepared):
        model.eval()
        for each in micro:
            (loss(model(**each)) / 2).backward()
        assert all(map(torch.equal, before, (mask.mask() for mask in masks_of(prepared))))
    assert_same_gradients(prepared, raw)


def test_masks_move_once_an_optimizer_step() -> None:
    raw, batch = pair("BERT")[0].eval(), pair("BERT")[2]
    schedule = mvpfx.LinearSchedule(warmup=0, cooldown=0)
    config = mvpfx.PruningConfig(density=0.2, schedule=schedule, score_init="magnitude")
    whole, parts = (mvpfx.prepare(copy.deepcopy(raw), config) for _ in range(2))
    seen: dict[int, list[list[Tensor]]] = {}
    for model, pieces in ((whole, 1), (parts, 2)):
        scheduler = mvpfx.SparsityScheduler(model, total_steps=4)
        optimizer = torch.optim.SGD(mvpfx.parameter_groups(model, lr=0.1, score_lr=10.0))
        moves = seen.setdefault(pieces, [])
        for _ in range(4):
            for piece in range(pieces):
                size = 2 // pieces
                micro = {k: v[piece * size : (piece + 1) * size] for k, v in batch.items()}
                (loss(model(**micro)) / pieces).backward()
                moves.append([mask.mask().clone() for mask in masks_of(model)])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for micro_step, masks in enumerate(seen[2]):
        assert all(map(torch.equal, masks, seen[1][micro_step // 2])), micro_step
    assert not all(map(torch.equal, seen[1][0], seen[1][1]))
    weights = dict(whole.named_parameters())
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-6)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"output_hidden_states": True, "output_attentions": True},
    {"return_dict": False},
    {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
    {},
]


def flattened(result: Any) -> list[Tensor]:
    """All tensors of a result, those of nested tuples and mappings included."""
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "layers"):  # a cache
        return [t for layer in result.layers for t in (layer.keys, layer.values)]
    if hasattr(result, "self_attention_cache"):
        return flattened(
            [result.self_attention_cache, result.cross_attention_cache],
        )
    if result is None:
        return []
    items = result.values() if hasattr(result, "values") else result
    return [tensor for item in items for tensor in flattened(item)]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_asked_for_by_call(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    for model in (raw, prepared):
        model.eval()
        model.set_attn_implementation("eager")
    for options in OPTIONS:
        wanted, found = raw(**batch, **options), prepared(**batch, **options)
        assert type(found) is type(wanted)
        if options.get("return_dict") is not False:
            assert list(found) == list(wanted)
        pairs = list(zip(flattened(found), flattened(wanted), strict=True))
        assert pairs
        for position, (one, other) in enumerate(pairs):
            assert_equal(one, other, f"{options}, {position}")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_hidden_states(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    for model in (raw, prepared):
        model.eval()
        result = model(**batch, output_hidden_states=True)
        states = getattr(result, "hidden_states", None) or result.decoder_hidden_states
        torch.stack([state.square().mean() for state in states]).sum().backward()
    assert_same_gradients(prepared, raw)


@pytest.mark.parametrize("name", ["BERT", "Llama", "GPT-2", "ViT", "T5", "BART", "Whisper"])
def test_attention_switched_after_capture(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    for implementation in ("sdpa", "eager", "sdpa", "eager"):
        for model in (raw, prepared):
            model.zero_grad()
            model.set_attn_implementation(implementation)
        assert_same_step(prepared, raw, batch)
    for implementation in ("sdpa", "eager"):  # what people did before there was a method
        for model in (raw, prepared):
            model.zero_grad()
            model.config._attn_implementation = implementation
        assert_same_step(prepared, raw, batch)
