"""Pruned, converted, prepared again and pruned further, whatever `convert` made of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.native_linear import NativeLinear
from mvpfx.storage import SparseLinear
from tests.zoo import ZOO

X = torch.linspace(-1, 1, 64).view(2, 32)


def pruned(model: nn.Module, density: float, batch: Any, **fields: Any) -> nn.Module:
    """Prepared and trained for six steps."""
    config = mvpfx.PruningConfig(density=density, **fields)
    mvpfx.prepare(model.train(), config, example_inputs=batch)
    scheduler = mvpfx.SparsityScheduler(model, 6)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3))
    for _ in range(6):
        called(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model.eval()


def called(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def nonzeros(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "scores" not in name)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())


@pytest.mark.parametrize("lowering", ["dense", "csr", "bsr", "native", "auto"])
@pytest.mark.parametrize("granularity", ["element", "row", "channel", "hybrid", (4, 4)])
def test_layers(granularity: Any, lowering: str) -> None:
    torch.manual_seed(0)
    if granularity == "hybrid":
        pytest.skip("blocks of 32 do not tile what is left")
    model, counts = layers(), list[int]()
    for density in (0.5, 0.25):
        pruned(model, density, X, granularity=granularity)
        wanted = model(X)
        model = mvpfx.convert(model, example_inputs=X, lowering=lowering)
        torch.testing.assert_close(model(X), wanted.detach(), rtol=1e-4, atol=1e-5)
        counts.append(nonzeros(model))
        granularity = "element" if granularity == (4, 4) else granularity
    assert counts[1] < counts[0]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("BERT", "element"), ("BERT", "head"), ("Llama", "channel"), ("GPT-2", "element")],
)
@pytest.mark.parametrize("lowering", ["dense", "native"])
def test_transformers(name: str, granularity: str, lowering: str) -> None:
    entry = ZOO[name]
    model, batch, counts = entry.model(), entry.batch(0), list[int]()
    for density in (0.5, 0.25):
        pruned(model, density, batch, granularity=granularity)
        with torch.no_grad():
            wanted = called(model, batch)
            model = mvpfx.convert(model, example_inputs=batch, lowering=lowering)
            torch.testing.assert_close(called(model, batch), wanted, rtol=1e-3, atol=1e-4)
        counts.append(nonzeros(model))
    assert counts[1] < counts[0]


def test_a_loaded_model_is_pruned_further(tmp_path: Path) -> None:
    model = pruned(layers(), 0.5, X)
    mvpfx.save(mvpfx.convert(model, example_inputs=X, lowering="native"), tmp_path / "small")
    small = mvpfx.load(tmp_path / "small", layers())
    wanted = small(X)
    assert any(isinstance(part, (SparseLinear, NativeLinear)) for part in small.modules())
    mvpfx.prepare(small, mvpfx.PruningConfig(density=1.0, schedule=mvpfx.ConstantSchedule()))
    torch.testing.assert_close(small(X), wanted)
    assert all(p.requires_grad for p in small.parameters())
    assert not any(isinstance(part, (SparseLinear, NativeLinear)) for part in small.modules())


def test_a_layer_used_twice_stays_one() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with torch.no_grad():
        shared.weight.mul_(torch.rand(16, 16) < 0.2)
    small = mvpfx.convert(model, example_inputs=X[:, :16], lowering="csr")
    mvpfx.prepare(small, mvpfx.PruningConfig(density=0.5))
    assert small.get_submodule("0") is small.get_submodule("2")


def test_a_bare_layer_cannot_be_replaced() -> None:
    layer = SparseLinear.from_dense(torch.eye(4))
    with pytest.raises(ValueError, match="the model is a SparseLinear, which cannot become"):
        mvpfx.prepare(layer)
