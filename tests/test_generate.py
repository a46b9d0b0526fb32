"""`generate` of prepared models: the same tokens as without masks, whatever the way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import masked_pair, pair, regions
from tests.zoo.entry import Batch

pytestmark = pytest.mark.every_model
NAMES = ["Llama", "GPT-2", "Qwen3", "Gemma 2", "Gemma 3", "T5", "BART", "Whisper"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "returned scores": {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    },
}


def prompt(name: str, batch: Batch) -> Batch:
    """What `generate` starts from: a batch without its targets."""
    if name == "Whisper":
        return {"input_features": batch["input_features"]}
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}


def generate(model: Any, inputs: Batch, **options: Any) -> Any:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # special tokens that tiny configurations leave unset
        return model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_of_the_model_without_masks(name: str, way: str) -> None:
    raw, prepared, batch = (pair if way == "beam" else masked_pair)(name)
    inputs = prompt(name, batch)
    raw.eval()
    prepared.eval()
    wanted, found = (generate(model, inputs, **WAYS[way]) for model in (raw, prepared))
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
        assert found.shape[1] >= 6
        return
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_training_goes_on_after_generating(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    losses: list[Tensor] = []
    for model in (raw, prepared):
        for _ in range(2):
            model.eval()
            generate(model, prompt(name, batch))
            model.train()
            torch.manual_seed(1)
            value = model(**batch).loss
            value.backward()
            losses.append(value.detach())
    torch.testing.assert_close(losses[:2], losses[2:])
    assert all(torch.isfinite(value) for value in losses)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_generating_runs_graphs(name: str) -> None:
    _, prepared, batch = masked_pair(name)
    generate(prepared.eval(), prompt(name, batch))
    assert all(region.calls for region in regions(prepared))
