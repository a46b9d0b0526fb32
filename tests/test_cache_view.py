"""Caches that a recorded call reads and writes: decoding step by step equals the masked model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.region import Region, block_names, region_of
from mvpfx.state import state_of
from tests.zoo import ZOO
from tests.zoo.check import difference, masked_copy, prepare

pytestmark = pytest.mark.every_model
DECODERS = [
    "GPT-2",
    "Llama",
    "Gemma 2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Mamba2", "Falcon-H1")),
]
ENCODER_DECODERS = ["T5", "BART", "Whisper"]


def pair(name: str) -> tuple[Any, Any]:
    """A prepared model and its reference, in eval mode."""
    raw = ZOO[name].model()
    prepared = prepare(raw, ZOO[name].batch(0))
    return prepared.eval(), masked_copy(raw, prepared).eval()


def block_regions(model: nn.Module) -> list[Region]:
    regions = [region_of(model.get_submodule(name)) for name in block_names(model)]
    return [region for region in regions if region is not None]


def steps(model: Any, prompt: dict[str, Any], start: Tensor, count: int) -> list[Tensor]:
    """Logits of a prompt and of greedy steps after it, by the model's own cache."""
    logits: list[Tensor] = []
    cache, tokens = None, start
    name = "cache_params" if "Mamba2" in type(model).__name__ else "past_key_values"
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        for _ in range(count):
            out = model(**prompt, **{ids: tokens, name: cache}, use_cache=True)
            cache = getattr(out, name)
            logits.append(out.logits)
            tokens = out.logits[:, -1:].argmax(-1)
    return logits


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_decoding_step_by_step_is_captured_and_equal(name: str) -> None:
    model, reference = pair(name)
    if name not in ENCODER_DECODERS:
        prompt: dict[str, Any] = {}
        start = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    else:
        batch = ZOO[name].batch(0)
        batch.pop("labels")
        with torch.no_grad():
            encoded = model.get_encoder()(**batch)
        prompt, start = {"encoder_outputs": encoded}, torch.tensor([[1, 5, 6], [1, 6, 5]])
    found, wanted = steps(model, prompt, start, 4), steps(reference, prompt, start, 4)
    for one, other in zip(found, wanted, strict=True):
        assert difference(one, other) <= 1e-6
    for region in block_regions(model):
        assert region.calls and not region.declined, region.declined


def test_a_second_prompt_starts_from_an_empty_cache() -> None:
    model, reference = pair("T5")
    for length in (3, 5, 1):
        batch = ZOO["T5"].batch(0)
        batch["labels"] = batch["labels"][:, :length].contiguous()
        with torch.no_grad():
            assert difference(model(**batch).logits, reference(**batch).logits) <= 1e-6


@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_flags_of_an_encoder_decoder_cache_are_written(name: str) -> None:
    model, _ = pair(name)
    batch = ZOO[name].batch(0)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    assert cache.is_updated == {0: True, 1: True}
    assert all(type(layer.keys) is Tensor for layer in cache.cross_attention_cache.layers)


def test_static_caches_are_written_in_place() -> None:
    from transformers import StaticCache

    model, reference = pair("Llama")
    found: list[Tensor] = []
    for each in (model, reference):
        cache = StaticCache(config=each.config, max_cache_len=12)
        tokens = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            for _ in range(3):
                logits: Tensor = each(input_ids=tokens, past_key_values=cache).logits
                tokens = logits[:, -1:].argmax(-1)
                found.append(logits)
        assert int(cache.get_seq_length()) == 6
    for one, other in zip(found[:3], found[3:], strict=True):
        assert difference(one, other) <= 1e-6


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "T5"])
def test_generated_tokens_are_equal(name: str, cache: str) -> None:
    model, reference = pair(name)
    batch = {k: v for k, v in ZOO[name].batch(0).items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    options["cache_implementation"] = cache
    options["disable_compile"] = True
    found, wanted = (each.generate(**batch, **options) for each in (model, reference))
    assert torch.equal(found, wanted)


class ReadsLength(nn.Module):
    """Takes another way once its cache is long."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, past_key_values: Any) -> Tensor:
        layer = self.long if past_key_values.get_seq_length(0) > 4 else self.short
        keys = layer(x)[:, None]
        return past_key_values.update(keys, keys, 0)[0].sum(1)


def test_control_flow_on_what_a_cache_holds_is_a_condition() -> None:
    from transformers import DynamicCache

    raw = ReadsLength()
    config = mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule())
    model = mvpfx.prepare(copy.deepcopy(raw), config)
    reference = masked_copy(raw, model)
    caches = [DynamicCache(), DynamicCache()]
    for length in (3, 1, 1, 1, 2, 1):
        x = torch.randn(2, length, 8)
        found, wanted = model(x, caches[0]), reference(x, caches[1])
        assert difference(found, wanted) <= 1e-6
    region = region_of(model)
    assert region is not None and state_of(model).regions == [""]
    assert region.calls == 6 and not region.declined
