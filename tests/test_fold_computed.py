"""Pruning hooks and parametrizations become parameters, and nothing else of the model changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mvpfx
from mvpfx.computed import duplicate, find_computed
from mvpfx.passes.fold_computed import FoldComputed
from mvpfx.program import Program
from tests.graphs import applied, apply, declined, mlp, outputs

X = torch.linspace(-2, 2, 20).view(5, 4)


class Masked(nn.Module):
    """A parametrization that multiplies by a mask."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Noisy(nn.Module):
    """A parametrization that drops weights at random, in eval mode too."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.rand_like(weight) < 0.5)


def every_second(weight: Tensor) -> Tensor:
    return (torch.arange(weight.numel()).view(weight.shape) % 2).to(weight.dtype)


def masked_by(model: nn.Module, name: str, leaf: str = "weight") -> None:
    owner = model.get_submodule(name)
    mask = every_second(getattr(owner, leaf))
    parametrize.register_parametrization(owner, leaf, Masked(mask))


def folded(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model after the pass; the one before it is as it was, to the bit."""
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    wanted = outputs(model, X)
    program, decisions = apply(FoldComputed(), Program(model))
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, X), wanted)
    assert torch.equal(outputs(program.model, X), wanted)
    return program.model, decisions


def test_hooks_of_prune_become_parameters() -> None:
    model = mlp(nn.ReLU())
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(model[0], "weight", 0.5)  # a container of both
    prune.random_unstructured(model[2], "bias", 1)
    model(X)  # leaves weights with a history, which torch does not copy
    result, decisions = folded(model)
    why = "torch.nn.utils.prune computed it in each call; density"
    assert applied(decisions) == [f"0.weight: {why} 0.2500", f"2.bias: {why} 0.6667"]
    assert result.state_dict().keys() == mlp(nn.ReLU()).state_dict().keys()
    assert [name for name, _ in result[0].named_parameters()] == ["weight", "bias"]  # pyright: ignore[reportIndexIssue]
    assert not list(find_computed(result))
    assert not any(module._forward_pre_hooks for module in result.modules())
    assert result.get_parameter("0.weight").requires_grad


def test_a_parametrization_with_zeros_becomes_a_parameter() -> None:
    model = mlp(nn.ReLU())
    masked_by(model, "0")
    parametrizations.weight_norm(model[2])
    result, decisions = apply(FoldComputed(), Program(model.eval()))
    assert applied(decisions) == [
        "0.weight: a parametrization computed it in each call; density 0.5000"
    ]
    assert declined(decisions) == [
        "2.weight: a parametrization computes it, and none of its values is zero"
    ]
    assert type(result.model.get_submodule("0")) is nn.Linear
    assert parametrize.is_parametrized(result.model.get_submodule("2"), "weight")


def test_what_is_random_stays() -> None:
    torch.manual_seed(0)
    model = mlp(nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Noisy())
    program = Program(model.eval())
    result, decisions = apply(FoldComputed(), program)
    assert declined(decisions) == [
        "0.weight: a parametrization computes it, and its values are others each time"
    ]
    assert result.model is program.model


def test_one_of_two_parametrizations_goes() -> None:
    model = mlp(nn.ReLU())
    masked_by(model, "0")
    parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    result, decisions = folded(model)
    assert declined(decisions) == [
        "0.bias: a parametrization computes it, and none of its values is zero"
    ]
    assert parametrize.is_parametrized(result.get_submodule("0"), "bias")
    assert isinstance(result.get_submodule("0")._parameters["weight"], nn.Parameter)


def test_a_parametrized_buffer_becomes_a_buffer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    masked_by(model, "0", "running_mean")
    result, _ = folded(model)
    assert dict(result.named_buffers()).keys() == dict(nn.BatchNorm1d(4).named_buffers("0")).keys()


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_a_weight_tied_to_a_plain_one_is_untied() -> None:
    model = tied()
    prune.l1_unstructured(model[0], "weight", 0.5)
    result, decisions = folded(model)
    assert applied(decisions) == [
        "0.weight: torch.nn.utils.prune computed it in each call; density 0.5000; "
        "no longer tied to 2.weight"
    ]
    assert torch.equal(result.get_parameter("2.weight"), model.get_parameter("2.weight"))


def test_weights_tied_under_the_same_mask_stay_tied() -> None:
    model = tied()
    for index in (0, 2):
        prune.custom_from_mask(model[index], "weight", every_second(torch.ones(4, 4)))
    result, _ = folded(model)
    assert result.get_parameter("0.weight") is result.get_parameter("2.weight")


def test_recurrent_layers_and_attention() -> None:
    torch.manual_seed(0)
    for model, name, leaf in (
        (nn.LSTM(4, 6), "", "weight_hh_l0"),
        (nn.MultiheadAttention(4, 2), "", "in_proj_weight"),
    ):
        prune.l1_unstructured(model, leaf, 0.5)
        batch: Any = (X,) if isinstance(model, nn.LSTM) else (X, X, X)
        wanted = model(*batch)[0]
        small = mvpfx.convert(model.eval(), example_inputs=batch)
        torch.testing.assert_close(small(*batch)[0], wanted, rtol=0, atol=1e-6)
        assert small.get_parameter(leaf).count_nonzero() == small.get_parameter(leaf).numel() // 2
        assert name == "" and not small._forward_pre_hooks


def test_graphs_of_earlier_calls_show_what_was_computed() -> None:
    model = nn.Sequential(mlp(nn.ReLU()), nn.Linear(3, 3))
    masked_by(model, "1")
    config = mvpfx.PruningConfig(schedule=mvpfx.ConstantSchedule(), density=0.5)
    mvpfx.prepare(model, config)
    wanted = outputs(model.eval(), X)
    for inputs in (None, X):
        small = mvpfx.convert(model, example_inputs=inputs)
        torch.testing.assert_close(outputs(small, X), wanted, rtol=0, atol=1e-6)
        assert parametrize.is_parametrized(small.get_submodule("1")) == (inputs is None)
        said = "graphs of earlier calls show it; pass example_inputs= to convert"
        assert (f"a parametrization computes it, and {said}" in mvpfx.explain(small)) == (
            inputs is None
        )


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_old_weight_norm_is_copied_and_stays() -> None:
    model = nn.Sequential(nn.LSTM(4, 6))
    old: Any = nn.utils.weight_norm
    old(model[0], "weight_hh_l0")
    model(X)
    small = mvpfx.convert(model.eval(), example_inputs=X)
    assert torch.equal(small(X)[0], model(X)[0])
    twin = duplicate(model)
    assert torch.equal(twin(X)[0], model(X)[0])
    assert copy.deepcopy(small.state_dict()).keys() == model.state_dict().keys()
