"""What `layer.weight` is, read and written by others than the layer's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mvpfx
from tests.training import assert_equal, half, masked_pair, masks_of, shuffle_scores, step, whole
from tests.zoo.entry import output


def small() -> nn.Module:
    """A prepared model of two layers, half of it masked."""
    model = mvpfx.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), half())
    shuffle_scores(model)
    return model


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT", "tied weights"])
def test_every_parameter_is_found_by_its_name(name: str) -> None:
    _, prepared, batch = masked_pair(name)
    for called in (False, True):
        if called:
            step(prepared, batch)
        for parameter_name, parameter in prepared.named_parameters(remove_duplicate=False):
            owner, _, leaf = parameter_name.rpartition(".")
            assert prepared.get_parameter(parameter_name) is parameter
            assert getattr(prepared.get_submodule(owner), leaf) is parameter
        assert set(prepared.state_dict()) >= {n for n, _ in prepared.named_parameters()}


def double(module: Any) -> None:
    module.weight.data.mul_(2)


def initialise(module: Any) -> None:
    torch.manual_seed(1)
    nn.init.xavier_uniform_(module.weight)


def copy_into(module: Any) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.full_like(module.weight, 0.5))


def set_data(module: Any) -> None:
    module.weight.data = torch.full_like(module.weight, 0.25)


def set_parameter(module: Any) -> None:
    module.weight = nn.Parameter(torch.full_like(module.weight, 0.125))


def reset(module: Any) -> None:
    torch.manual_seed(2)
    module.reset_parameters()


def set_entries(module: Any) -> None:
    with torch.no_grad():
        module.weight[0] = 0.0


EDITS = [double, initialise, copy_into, set_data, set_parameter, reset, set_entries]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_what_is_written_to_a_weight_stays(edit: Callable[[Any], None], called: bool) -> None:
    model, x = small(), torch.randn(3, 8)
    raw = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    raw.load_state_dict(model.state_dict(), strict=False)
    if called:
        model(x)
    for each in (model, raw):
        edit(each.get_submodule("0"))
    assert torch.equal(model.get_parameter("0.weight"), raw.get_parameter("0.weight"))
    with torch.no_grad():
        for mask in masks_of(model):
            raw.get_parameter(mask.site.name).mul_(mask.mask())
    assert_equal(model(x), raw(x))


def test_magnitude_sees_what_is_written() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    mvpfx.prepare(model, half(criterion="magnitude"))
    model(torch.randn(2, 8))
    (mask,) = masks_of(model)
    layer: Any = model.get_submodule("0")
    with torch.no_grad():
        layer.weight.copy_(torch.arange(64.0).view(8, 8))
    assert torch.equal(mask.mask(), torch.arange(64).view(8, 8) >= 32)
    layer.weight = nn.Parameter(torch.arange(64.0, 0, -1).view(8, 8))
    model(torch.randn(2, 8))
    assert torch.equal(mask.mask(), torch.arange(64).view(8, 8) < 32)


class Parent(nn.Module):
    """Multiplies by its children's weights, and never calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first.weight) @ self.second.weight


@pytest.mark.parametrize("refuse", [False, True], ids=["graph", "fallback"])
def test_a_parent_that_multiplies_by_its_childrens_weights(
    refuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Parent()
    model = mvpfx.prepare(copy.deepcopy(raw), half())
    shuffle_scores(model)
    if refuse:
        model.get_submodule("first").register_forward_hook(lambda m, args, out: None)
    x = torch.randn(3, 8)
    first, second = (raw.get_parameter(mask.site.name) * mask.mask() for mask in masks_of(model))
    assert_equal(model(x), F.linear(x, first) @ second)


def test_outside_of_any_forward_a_matmul_is_not_masked() -> None:
    model, x = small(), torch.randn(3, 8)
    layer: Any = model.get_submodule("0")
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, model.get_parameter("0.weight")))
    assert not torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))


def test_an_error_in_a_forward_ends_it() -> None:
    model = small()
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    layer: Any = model.get_submodule("0")
    assert isinstance(layer.weight, nn.Parameter)


def test_parametrized_before_prepare() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    parametrize.register_parametrization(model[0], "weight", Halved())
    raw = copy.deepcopy(model)
    mvpfx.prepare(model, whole())
    x = torch.randn(3, 8)
    assert_equal(output(model(x)), output(raw(x)))
