"""Parameters: frozen ones, and what people do with lists and names of them."""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import mvpfx
from mvpfx.granularity import to_matrix
from tests.training import (
    assert_equal,
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    pair,
    shuffle_scores,
    step,
)
from tests.zoo import ZOO
from tests.zoo.entry import loss, output

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "GPT-2", "Llama", "T5", "ViT"]
CALLED = pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])


@CALLED
@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_have_no_gradient_and_their_scores_learn(name: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    wanted = {n: p.grad for n, p in after_step(raw, batch).items()}
    sites = {mask.site.name: mask for mask in masks_of(prepared)}
    weights = {site: prepared.get_parameter(site).requires_grad_(False) for site in sites}
    found = after_step(prepared, batch)
    for parameter_name, gradient in wanted.items():
        if parameter_name not in sites:
            assert_equal(found[parameter_name].grad, gradient, parameter_name)
            continue
        assert found[parameter_name].grad is None
        assert gradient is not None
        weight = weights[parameter_name]
        movement = to_matrix(gradient * weight, sites[parameter_name].site.out_dim)
        assert_equal(sites[parameter_name].require_scores().grad, movement, parameter_name)


def after_step(model: Any, batch: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model after a backward pass."""
    step(model, batch)
    return dict(model.named_parameters())


@CALLED
@pytest.mark.parametrize("name", NAMES)
def test_frozen_scores_have_no_gradient_and_their_weights_learn(name: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    for mask in masks_of(prepared):
        mask.requires_grad_(False)
    found, wanted = step(prepared, batch), step(raw, batch)
    assert_equal(output(found), output(wanted))
    gradients = {n: p.grad for n, p in raw.named_parameters()}
    for mask in masks_of(prepared):
        assert mask.require_scores().grad is None
        weight = prepared.get_parameter(mask.site.name)
        assert_equal(weight.grad, gradients[mask.site.name] * mask.mask(), mask.site.name)


@CALLED
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_block(name: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    block = masks_of(prepared)[0].site.module_name.rpartition(".")[0]
    for model in (raw, prepared):
        model.get_submodule(block).requires_grad_(False)
        step(model, batch)
    frozen = [n for n, _ in prepared.named_parameters() if n.startswith(f"{block}.")]
    assert any(n.endswith("scores") for n in frozen)
    parameters = dict(prepared.named_parameters())
    assert all(parameters[n].grad is None for n in frozen)
    kept = {mask.site.name: mask.mask() for mask in masks_of(prepared)}
    for parameter_name, parameter in raw.named_parameters():
        wanted = parameter.grad
        if wanted is not None and parameter_name in kept:
            wanted = wanted * kept[parameter_name]
        assert_equal(parameters[parameter_name].grad, wanted, parameter_name)
    for mask in masks_of(prepared):
        assert (mask.require_scores().grad is None) == (mask.site.name in frozen)


def test_a_model_frozen_before_prepare_learns_only_scores() -> None:
    raw, batch = ZOO["BERT"].model().requires_grad_(False), ZOO["BERT"].batch(0)
    prepared = mvpfx.prepare(raw, half())
    step(prepared, batch)
    for name, parameter in prepared.named_parameters():
        assert (parameter.grad is not None) == name.endswith("scores"), name
    groups = mvpfx.parameter_groups(prepared, lr=0.1)
    assert [group["name"] for group in groups] == ["scores"]


def test_parameter_groups_leave_out_what_is_frozen() -> None:
    prepared = pair("BERT")[1]
    block = prepared.get_submodule("bert.encoder.layer.0").requires_grad_(False)
    frozen = {id(parameter) for parameter in block.parameters()}
    listed = [p for g in mvpfx.parameter_groups(prepared, lr=0.1) for p in g["params"]]
    assert frozen
    assert not frozen & {id(parameter) for parameter in listed}
    trainable = [p for p in prepared.parameters() if p.requires_grad]
    assert {id(p) for p in listed} == {id(p) for p in trainable}
    assert len(listed) == len(trainable)


def test_thawing_after_a_call() -> None:
    raw, prepared, batch = masked_pair("BERT")
    for model in (raw, prepared):
        model.requires_grad_(False)
        model(**batch)
        model.requires_grad_(True)
    assert_same_step(prepared, raw, batch)


def test_gradients_are_clipped_over_weights_and_scores() -> None:
    raw, prepared, batch = pair("BERT")
    for model in (raw, prepared):
        model.eval()
        step(model, batch)
    weights = [p for n, p in prepared.named_parameters() if not n.endswith("scores")]
    norms = [nn.utils.clip_grad_norm_(list(p), 0.01) for p in (raw.parameters(), weights)]
    assert_equal(norms[1], norms[0])
    for parameter, wanted in zip(weights, raw.parameters(), strict=True):
        assert_equal(parameter.grad, wanted.grad)
    everything = nn.utils.clip_grad_norm_(prepared.parameters(), 1e-3)
    assert everything > 0.01


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, foreach=True),
    ],
    ids=["SGD", "AdamW", "Adam, foreach"],
)
def test_optimizers_and_weight_decay_do_the_same(optimizer: Any) -> None:
    raw, prepared, batch = pair("BERT")
    for model in (raw, prepared):
        model.train()
        weights = [p for n, p in model.named_parameters() if not n.endswith("scores")]
        own = optimizer(weights)
        for seed in range(3):
            step(model, batch, seed)
            own.step()
            own.zero_grad()
    for name, parameter in raw.named_parameters():
        torch.testing.assert_close(prepared.get_parameter(name), parameter, msg=name)


def test_parameters_as_one_vector() -> None:
    raw, prepared, batch = masked_pair("BERT")
    raw.eval()
    prepared.eval()
    prepared(**batch)
    vector = nn.utils.parameters_to_vector(prepared.parameters())
    assert len(vector) == sum(p.numel() for p in prepared.parameters())
    nn.utils.vector_to_parameters(vector * 0, prepared.parameters())
    assert not output(prepared(**batch)).any()
    nn.utils.vector_to_parameters(vector, prepared.parameters())
    assert_equal(output(prepared(**batch)), output(raw(**batch)))


@CALLED
@pytest.mark.parametrize("name", ["BERT", "Llama", "convolutions"])
def test_functional_calls_use_the_given_parameters(name: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    raw.eval()
    prepared.eval()
    if called:
        prepared(**batch)
    names = [n for n, _ in raw.named_parameters()]
    other = {n: torch.randn_like(raw.get_parameter(n)) * 0.1 for n in names}
    kept = {mask.site.name: mask.mask() for mask in masks_of(prepared)}
    masked = {n: t * kept[n] if n in kept else t for n, t in other.items()}
    wanted = functional_call(raw, masked, (), batch)
    found = functional_call(prepared, other, (), batch)
    assert_equal(output(found), output(wanted))
    assert_equal(output(prepared(**batch)), output(raw(**batch)), "afterwards")


def test_gradients_by_transform() -> None:
    raw, prepared, batch = masked_pair("BERT")
    raw.eval()
    prepared.eval()
    found, wanted = (
        grad(lambda p, m=model: loss(functional_call(m, p, (), batch)))(
            {n: p.detach() for n, p in model.named_parameters()}
        )
        for model in (prepared, raw)
    )
    kept = {mask.site.name: mask for mask in masks_of(prepared)}
    for name, gradient in wanted.items():
        if name in kept:
            weight = prepared.get_parameter(name).detach()
            assert_equal(found[f"{name}_mask.scores"], gradient * weight, f"scores of {name}")
            gradient = gradient * kept[name].mask()
        assert_equal(found[name], gradient, name)


# torch itself compiles its rules of forward differentiation the old way.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_models_in_a_batch_and_derivatives_forward() -> None:
    raw = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    prepared = mvpfx.prepare(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), half())
    shuffle_scores(prepared)
    names = [n for n, _ in raw.named_parameters()]
    stacked = {n: torch.randn(4, *raw.get_parameter(n).shape) for n in names}
    kept = {mask.site.name: mask.mask() for mask in masks_of(prepared)}
    masked = {n: t * kept[n] if n in kept else t for n, t in stacked.items()}
    x = torch.randn(5, 8)

    def run(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,))

    found = vmap(lambda p: run(prepared, p))(stacked)
    wanted = vmap(lambda p: run(raw, p))(masked)
    assert_equal(found, wanted)
    one, tangent = ({n: t[i] for n, t in stacked.items()} for i in range(2))
    one_masked, tangent_masked = ({n: t[i] for n, t in masked.items()} for i in range(2))
    found = jvp(lambda p: run(prepared, p), (one,), (tangent,))
    wanted = jvp(lambda p: run(raw, p), (one_masked,), (tangent_masked,))
    assert_equal(found[1], wanted[1])


def test_a_weight_with_a_parametrization_after_prepare_is_refused() -> None:
    prepared = mvpfx.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), half())
    nn.utils.parametrizations.weight_norm(prepared.get_submodule("0"))
    message = (
        "0.weight is masked, but is no parameter of its Linear any more: something was put in its "
        "place after mvpfx.prepare. Add parametrizations before preparing the model."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prepared(torch.randn(2, 8))


def test_scores_cannot_be_mapped_over() -> None:
    prepared = mvpfx.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), half())
    stacked = {n: torch.randn(4, *p.shape) for n, p in prepared.named_parameters()}
    x = torch.randn(5, 8)
    message = (
        "vmap maps over scores, but there is one mask for all of the batch. "
        "Map over the weights alone: in_dims={..., '...scores': None}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vmap(lambda p: functional_call(prepared, p, (x,)))(stacked)


@pytest.mark.parametrize("name", ["Llama", "convolutions"])
def test_gradients_of_gradients(name: str) -> None:
    raw, prepared, batch = pair(name)
    for model in (raw, prepared):
        model.eval()
        if name == "Llama":
            model.set_attn_implementation("eager")  # the fused kernel has no second derivative
        weights = [p for n, p in model.named_parameters() if not n.endswith("scores")]
        gradients = torch.autograd.grad(loss(model(**batch)), weights, create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    for parameter_name, parameter in raw.named_parameters():
        found, wanted = prepared.get_parameter(parameter_name).grad, parameter.grad
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=parameter_name)
    assert all(mask.require_scores().grad is not None for mask in masks_of(prepared))
