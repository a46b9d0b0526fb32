"""Recurrent layers and cells: their matrices are sites like others."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mvpfx
from mvpfx.scheduler import masks_of
from mvpfx.state import state_of


class Layer(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][..., : self.head.in_features])


class Cell(nn.Module):
    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


MODELS: dict[str, Any] = {
    "lstm": lambda: Layer(nn.LSTM(6, 8, num_layers=2, batch_first=True)),
    "both ways": lambda: Layer(nn.GRU(6, 8, bidirectional=True, batch_first=True)),
    "projected": lambda: Layer(nn.LSTM(6, 8, proj_size=7, batch_first=True)),
    "rnn": lambda: Layer(nn.RNN(6, 8, batch_first=True)),
    "lstm cell": lambda: Cell(nn.LSTMCell(6, 8)),
    "gru cell": lambda: Cell(nn.GRUCell(6, 8)),
    "rnn cell": lambda: Cell(nn.RNNCell(6, 8)),
}


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "projected":
        model.head = nn.Linear(7, 4)
    return model, torch.randn(3, 5, 6)


def prepared(model: nn.Module) -> nn.Module:
    config = mvpfx.PruningConfig(density=0.4, schedule=mvpfx.ConstantSchedule())
    mvpfx.prepare(model, config)
    with torch.no_grad():
        for mask in masks_of(model):
            mask.require_scores().copy_(torch.rand_like(mask.require_scores()))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_models_train_like_the_reference(name: str) -> None:
    raw, x = build(name)
    model = prepared(copy.deepcopy(raw))
    matrices = [n for n, p in raw.named_parameters() if p.dim() == 2]
    assert list(state_of(model).sites) == matrices
    reference = copy.deepcopy(raw)
    with torch.no_grad():
        for mask in masks_of(model):
            reference.get_parameter(mask.site.name).mul_(mask.mask())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, wanted = one(x), reference(x)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        found.pow(2).sum().backward()
        reference.zero_grad()
        wanted.pow(2).sum().backward()
        for mask in masks_of(one):
            gradient = reference.get_parameter(mask.site.name).grad
            own = one.get_parameter(mask.site.name)
            assert gradient is not None
            torch.testing.assert_close(own.grad, gradient * mask.mask(), rtol=1e-5, atol=1e-7)
            moved = gradient * own.detach()
            torch.testing.assert_close(mask.require_scores().grad, moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_models_convert(name: str) -> None:
    raw, x = build(name)
    model = prepared(raw).eval()
    small = mvpfx.convert(model, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-4)
    assert not masks_of(small)
    for site in state_of(model).sites.values():
        density = float((small.get_parameter(site.name) != 0).float().mean())
        assert density == pytest.approx(0.4, abs=0.05), site.name


def test_weights_move_with_the_module() -> None:
    model, x = build("lstm")
    prepared(model).double()
    assert model(x.double()).dtype == torch.float64
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model(x).any()


def test_computed_weights_are_declined_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    reason = (
        "its weight is computed from other parameters (a parametrization, weight norm, "
        "torch.nn.utils.prune); to prune it make it a parameter first, with "
        "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
    )
    message = (
        f'overrides name 1.weight ("1"), which is no site: {reason}. Take it out of overrides.'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mvpfx.prepare(copy.deepcopy(model), mvpfx.PruningConfig(overrides={"1": {"density": 0.5}}))
    x = torch.randn(2, 4)
    wanted = model(x)
    mvpfx.prepare(model, mvpfx.PruningConfig(schedule=mvpfx.ConstantSchedule(), density=1.0))
    torch.testing.assert_close(model(x), wanted)
    assert f"1.weight\n  - site: {reason}" in mvpfx.explain(model)
