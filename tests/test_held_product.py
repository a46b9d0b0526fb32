"""HeldProduct: masked weights between forwards without gradients, and when they are made anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx import recomputing
from mvpfx.mask import Mask
from mvpfx.scheduler import masks_of
from tests.toy_masks import make_mask, values

CRITERIA = ["movement", "magnitude", "l0"]


class Layer(nn.Module):
    """A masked weight, read in a forward."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.mask, self.weight = make_mask(values(8, 8), **fields)
        if self.mask.density is not None:
            self.mask.density = 0.5

    def forward(self) -> Tensor:
        return self.mask(self.weight)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_made_once(criterion: str, mode: Any) -> None:
    layer = Layer(criterion=criterion).eval()
    with mode():
        first = layer()
        assert layer() is first
    wanted = layer().detach()  # with gradients
    assert torch.equal(first, wanted)
    with mode():
        again = layer()
        assert again is not first and torch.equal(again, first)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    "what", ["weight", "scores", "density", "train", "load", "cast", "data of weight", "in place"]
)
def test_it_follows_what_changes(criterion: str, what: str) -> None:
    layer = Layer(criterion=criterion).eval()
    mask = layer.mask
    with torch.no_grad():
        first = layer()
        before = first.clone()
        if what == "weight":
            layer.weight.mul_(-2.0)
        elif what == "scores" and mask.scores is not None:
            mask.scores.neg_()
        elif what == "density" and mask.density is not None:
            mask.density = 0.25
        elif what == "train":
            layer.weight.data.mul_(-2.0)
            layer.train().eval()
        elif what == "load":
            layer.load_state_dict({k: -v for k, v in layer.state_dict().items()})
        elif what == "cast":
            layer.double()
        elif what == "data of weight":
            layer.weight.data = layer.weight.data * -2.0
        elif what == "in place":
            first.zero_()
        found = layer()
        twin = copy.deepcopy(layer)
        assert torch.equal(found, twin())
        if what == "in place":
            assert torch.equal(found, before)
        elif what == "cast":
            assert found.dtype == torch.float64
        elif what not in ("scores", "density"):
            assert not torch.equal(found, before)


def test_reading_a_layers_weight_outside_of_a_forward_lets_go_of_it() -> None:
    """As a merge of adapters does before it writes past all counters."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    mvpfx.prepare(model, mvpfx.PruningConfig(schedule=mvpfx.ConstantSchedule(), density=0.5))
    model.eval()
    x = values(2, 4)
    with torch.no_grad():
        before = model(x)
        model.get_submodule("0").weight.data.mul_(2.0)  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(model(x), 2 * before)


def test_evaluation_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mvpfx.prepare(model, mvpfx.PruningConfig(schedule=mvpfx.ConstantSchedule(), density=0.5))
    calls: list[int] = []

    def counted(weight: Tensor, mask: Tensor) -> Tensor:
        calls.append(1)
        return recomputing.product(weight, mask)

    monkeypatch.setattr("mvpfx.straight_through.product", counted)
    with torch.no_grad():
        for _ in range(3):
            model.eval()(values(2, 4))
            model(values(2, 4))
        assert len(calls) == 2 * 3, "once after each eval()"
    assert all(isinstance(mask, Mask) for mask in masks_of(model))


def test_a_forward_with_gradients_frees_it() -> None:
    layer = Layer().eval()
    with torch.no_grad():
        layer()
    assert layer.mask.held._made is not None
    layer()
    assert layer.mask.held._made is None
