"""A converted model is one to go on with: other dtypes, copies, generation, training, int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpfx.facts import NATIVE_DENSE
from mvpfx.hf import PruningTrainer
from mvpfx.native_linear import NativeLinear
from mvpfx.storage import SparseLinear
from tests.citizens import MODELS, STORAGES, citizen, labels, shapes
from tests.graphs import outputs
from tests.toy_masks import raises

pytestmark = pytest.mark.every_model
DTYPES = {torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
models = pytest.mark.parametrize("name", MODELS)
every_storage = pytest.mark.parametrize("lowering", STORAGES)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def unstored(layer: SparseLinear) -> Tensor:
    """Where a layer stores nothing, blocks of zeros for BSR; no training can change that."""
    block, rows, columns = layer.block, layer.out_features, layer.in_features
    grid = (layer.dense() == 0).view(rows // block, block, columns // block, block)
    blocks = grid.all(dim=3).all(dim=1)
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)


@models
@every_storage
def test_the_citizens_are_small_and_sparse(name: str, lowering: str) -> None:
    model, small, batch = citizen(name, lowering)
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-5
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < 0.9 * whole
    assert bool(sparse_layers(small)) == (lowering not in ("dense", NATIVE_DENSE))
    native_dense = any(isinstance(module, NativeLinear) for module in small.modules())
    assert native_dense == (lowering == NATIVE_DENSE)


@models
@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes(name: str, lowering: str, dtype: torch.dtype) -> None:
    _, small, batch = citizen(name, lowering)
    wanted = outputs(small, batch)
    moved = small.half() if dtype == torch.float16 else small.to(dtype)
    assert {p.dtype for p in moved.parameters()} == {dtype}
    found = outputs(moved, batch)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= DTYPES[dtype] * max(1.0, float(wanted.abs().max()))


@models
@every_storage
def test_copies_and_state_dicts(name: str, lowering: str) -> None:
    _, small, batch = citizen(name, lowering)
    wanted, held = outputs(small, batch), copy.deepcopy(small.state_dict())
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(outputs(twin, batch), wanted)
    assert not torch.equal(outputs(small, batch), wanted)
    assert str(small.load_state_dict(held)) == "<All keys matched successfully>"
    assert torch.equal(outputs(small, batch), wanted)


@pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning")
@pytest.mark.parametrize("name", ["llama_cached", "gpt2"])
@every_storage
def test_generation_with_a_cache(name: str, lowering: str) -> None:
    model, small, batch = citizen(name, lowering)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    ids = batch["input_ids"]
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "min_new_tokens": 6}
    found, wanted = (one.generate(ids, **options) for one in (small, model))  # pyright: ignore[reportCallIssue]
    assert torch.equal(found, wanted) and found.shape[1] == ids.shape[1] + 6


@models
@every_storage
def test_fine_tuning_reaches_all_that_is_left(name: str, lowering: str) -> None:
    _, small, batch = citizen(name, lowering)
    assert not any(p.requires_grad for p in small.parameters())
    small.requires_grad_()
    sizes = shapes(small)
    empty = {n: unstored(layer) for n, layer in sparse_layers(small).items()}
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    losses: list[float] = []
    small.train()
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(5):
        loss: Tensor = small(**labels(batch, name)).loss
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    still = [n for n, p in small.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    assert shapes(small) == sizes
    for n, layer in sparse_layers(small).items():
        assert torch.equal(layer.dense() == 0, empty[n]), n  # all that is stored moved


def test_the_pruning_trainer_says_that_there_is_nothing_to_prune() -> None:
    _, small, _ = citizen("bert", "dense")
    message = (
        "BertForSequenceClassification was converted, and has no masks. To prune it further give "
        "config=; to train it on as it is use transformers.Trainer, after model.requires_grad_()."
    )
    with raises(ValueError, message):
        PruningTrainer(small)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
@pytest.mark.parametrize("lowering", ["dense", "csr"])
def test_dynamic_quantisation(lowering: str) -> None:
    _, small, batch = citizen("bert", lowering)
    wanted = outputs(small, batch)
    quantize: Any = vars(torch.ao.quantization)["quantize_dynamic"]
    quantised: Any = quantize(small, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(m).__module__ for m in quantised.modules()]
    count = sum(kind.startswith("torch.ao.nn.quantized.dynamic") for kind in kinds)
    assert count >= 12 if lowering == "dense" else count == 1  # the classifier
    assert (outputs(quantised, batch) - wanted).abs().max() <= 5e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", ["bert", "llama_cached"])
@pytest.mark.parametrize("lowering", ["dense", "csr"])
def test_torchao_int8_weights(name: str, lowering: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    _, small, batch = citizen(name, lowering)
    wanted = outputs(small, batch)
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    count = sum(type(p.data).__name__ == "Int8Tensor" for p in small.parameters())
    assert count >= 12 if lowering == "dense" else count >= 1
    assert (outputs(small, batch) - wanted).abs().max() <= 5e-2 * wanted.abs().max()
