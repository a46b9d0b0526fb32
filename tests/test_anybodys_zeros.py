"""`convert` takes zeros from anywhere: torch's own pruning, SparseGPT, Wanda, a script."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import mvpfx
from mvpfx.cost import MARGIN
from mvpfx.storage import SparseLinear
from tests.graphs import outputs
from tests.models import build
from tests.test_fold_computed import Masked

LAYER = "bert.encoder.layer.{}.{}"
METHODS = ("l1_unstructured", "random_unstructured", "ln_structured", "global_unstructured", "both")


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Projections of the blocks, in HF's two spellings of a linear layer."""
    return [
        module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and re.search(r"\.\d+\.", name)
    ]


def prune_by(method: str, layers: list[nn.Module]) -> None:
    if method == "global_unstructured":
        named = [(layer, "weight") for layer in layers]
        prune.global_unstructured(named, pruning_method=prune.L1Unstructured, amount=0.7)
        return
    for layer in layers:
        if method in ("ln_structured", "both"):
            prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        if method in ("l1_unstructured", "both"):
            prune.l1_unstructured(layer, "weight", 0.5)
        if method == "random_unstructured":
            prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    ("name", "method", "lowering"),
    [
        *(("bert", method, "csr") for method in METHODS),
        *((name, "both", lowering) for name in ("gpt2", "llama") for lowering in ("auto", "csr")),
    ],
)
def test_models_pruned_by_torch(name: str, method: str, lowering: str) -> None:
    torch.manual_seed(3)
    model, batch = build(name)
    layers = linear_layers(model.eval())
    prune_by(method, layers)
    wanted, keys = outputs(model, batch), set(model.state_dict())
    model(**batch).loss.backward()  # as a training loop leaves it: weights have a history
    small = mvpfx.convert(model, example_inputs=batch, lowering=lowering)
    assert (outputs(small, batch) - wanted).abs().max() <= 1e-5
    assert torch.equal(outputs(model, batch), wanted)
    assert set(model.state_dict()) == keys
    assert not any("_orig" in key or "_mask" in key for key in small.state_dict())
    folded = [d for d in mvpfx.report_of(small).decisions if d.action == "fold into a parameter"]
    assert len(folded) == len(layers)
    assert all(d.applied for d in folded)
    if lowering == "csr":
        assert sum(isinstance(module, SparseLinear) for module in small.modules()) >= len(layers)


def test_pruned_channels_go_whoever_pruned_them() -> None:
    model, batch = build("bert")
    for index in range(2):
        wide = model.get_submodule(LAYER.format(index, "intermediate.dense"))
        prune.ln_structured(wide, "weight", 24, n=2, dim=0)
    small = mvpfx.convert(model.eval(), example_inputs=batch)
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-5
    for index in range(2):
        assert small.get_parameter(LAYER.format(index, "output.dense.weight")).shape == (32, 24)


def test_removed_hooks_give_the_same() -> None:
    model, batch = build("bert")
    layers = linear_layers(model.eval())
    prune_by("both", layers)
    hooked = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    for layer in layers:
        prune.remove(layer, "weight")
    removed = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    assert torch.equal(outputs(hooked, batch), outputs(removed, batch))
    assert hooked.state_dict().keys() == removed.state_dict().keys()


def test_masks_by_parametrization() -> None:
    model, batch = build("bert")
    for index in range(2):
        wide = model.get_submodule(LAYER.format(index, "intermediate.dense"))
        mask = (torch.rand(48, 32) < 0.3).float()
        mask[:16] = 0
        parametrize.register_parametrization(wide, "weight", Masked(mask))
    small = mvpfx.convert(model.eval(), example_inputs=batch, lowering="csr")
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-5
    layer: Any = small.get_submodule(LAYER.format(0, "intermediate.dense"))
    assert isinstance(layer, SparseLinear) and layer.out_features <= 32


def two_of_four(weight: Tensor, norms: Tensor) -> Tensor:
    """Wanda: of each four inputs the two with the largest `abs(W) * norm(x)` are kept."""
    scores = (weight.abs() * norms).view(len(weight), -1, 4)
    kept = scores.topk(2, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, kept, 1.0).view(weight.shape)


def half_of_row(weight: Tensor, norms: Tensor) -> Tensor:
    """Wanda, unstructured: in each row the half with the largest `abs(W) * norm(x)`."""
    scores = weight.abs() * norms
    kept = scores.topk(weight.shape[1] // 2, dim=1).indices
    return torch.zeros_like(scores).scatter(1, kept, 1.0)


@pytest.mark.parametrize("lowering", ["auto", "csr", "bsr", "dense"])
@pytest.mark.parametrize("pattern", [two_of_four, half_of_row])
def test_one_shot_masks_of_a_language_model(pattern: Any, lowering: str) -> None:
    torch.manual_seed(4)
    model, batch = build("llama")
    layers = linear_layers(model.eval())
    for layer in layers:
        weight: Any = layer.weight
        with torch.no_grad():
            weight *= pattern(weight, torch.rand(weight.shape[1]) + 0.5)
    small = mvpfx.convert(model, example_inputs=batch, lowering=lowering)
    assert (outputs(small, batch) - outputs(model, batch)).abs().max() <= 1e-5
    report = mvpfx.report_of(small)
    chosen = {d.site: d for d in report.decisions if d.action.startswith("store as")}
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        decision = chosen[f"{names[id(layer)]}.weight"]
        if lowering == "auto":
            check_not_slower(decision.action, decision.reason)
        elif lowering != "dense":
            assert decision.action == f"store as {lowering}" and decision.applied
    assert report.max_difference is not None and report.max_difference <= 1e-5


def check_not_slower(action: str, reason: str) -> None:
    """A sparse storage is one that was measured to be faster, alone or in the whole model."""
    storage = action.removeprefix("store as ")
    if reason == "alike for all sites, which is fastest end to end":
        return
    times = {name: float(ms) for name, ms in re.findall(r"(\w+) ([\d.]+) ms", reason)}
    assert re.match(r"measured at 16 tokens, density 0\.50: dense \d+\.\d+ ms", reason), reason
    if storage in ("csr", "bsr"):
        assert times[storage] <= MARGIN * times["dense"] + 1e-3, reason
