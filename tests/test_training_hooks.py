"""Hooks on models, blocks, inner modules and tensors: they run, see and may change the same."""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import mvpfx
from tests.training import (
    assert_equal,
    assert_same_gradients,
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    pair,
    regions,
    step,
)
from tests.zoo.entry import output

# torch warns of hooks on modules whose result is no tensor, or whose input needs no gradient.
pytestmark = [
    pytest.mark.every_model,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning"),
]
PLACES = {
    "BERT": ["", "bert.encoder.layer.0", "bert.encoder.layer.1.attention.self.query"],
    "GPT-2": ["", "transformer.h.0", "transformer.h.1.mlp.c_fc", "transformer.h.0.ln_1"],
    "Llama": ["model", "model.layers.1", "model.layers.0.mlp.down_proj"],
}
CASES = [(name, place) for name, places in PLACES.items() for place in places]
WHERE = pytest.mark.parametrize(("name", "place"), CASES)
CALLED = pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
Seen = list[Tensor]
Register = Callable[[nn.Module, Seen], RemovableHandle]


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return tensors(output(value)) if hasattr(value, "keys") and value else []


def on_forward(module: nn.Module, seen: Seen) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, out: seen.extend(tensors(out)))


def on_pre_forward(module: nn.Module, seen: Seen) -> RemovableHandle:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(tensors(args))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_backward(module: nn.Module, seen: Seen) -> RemovableHandle:
    return module.register_full_backward_hook(lambda m, inner, outer: seen.extend(tensors(outer)))


def on_pre_backward(module: nn.Module, seen: Seen) -> RemovableHandle:
    return module.register_full_backward_pre_hook(lambda m, outer: seen.extend(tensors(outer)))


KINDS: list[Register] = [on_forward, on_pre_forward, on_backward, on_pre_backward]


@CALLED
@pytest.mark.parametrize("register", KINDS)
@WHERE
def test_a_hook_sees_what_it_would_without_masks(
    name: str, place: str, register: Register, called: bool
) -> None:
    raw, prepared, batch = masked_pair(name)
    seen: list[Seen] = [[], []]
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    handles = [
        register(model.get_submodule(place), own)
        for model, own in zip((raw, prepared), seen, strict=True)
    ]
    assert_same_step(prepared, raw, batch)
    assert len(seen[0]) == len(seen[1])
    for wanted, found in zip(*seen, strict=True):
        assert_equal(found, wanted)
    count = len(seen[0])
    for handle, model in zip(handles, (raw, prepared), strict=True):
        handle.remove()
        model.zero_grad()
    assert_same_step(prepared, raw, batch)
    assert len(seen[0]) == len(seen[1]) == count


@pytest.mark.parametrize("name", PLACES)
def test_graphs_serve_again_once_an_inner_hook_is_gone(name: str) -> None:
    _, prepared, batch = masked_pair(name)
    handle = on_backward(prepared.get_submodule(PLACES[name][2]), [])
    step(prepared, batch)
    region = next(r for r in regions(prepared) if PLACES[name][2].startswith(f"{r.name}."))
    assert region.calls == 0
    assert list(region.declined) == [
        f"{PLACES[name][2].removeprefix(region.name + '.')} has backward hooks"
    ]
    handle.remove()
    step(prepared, batch)
    assert region.calls == 1


@CALLED
@WHERE
def test_a_hook_may_change_what_it_sees(name: str, place: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    if called:
        step(prepared, batch)
        prepared.zero_grad()
    for model in (raw, prepared):
        module = model.get_submodule(place)
        if place.count(".") > 2:  # an inner module, whose output is one tensor
            module.register_forward_hook(lambda m, args, out: out * 2)
        module.register_full_backward_hook(
            lambda m, inner, outer: tuple(
                g * 3 if g is not None and g.is_floating_point() else g for g in inner
            )
        )
    assert_same_step(prepared, raw, batch)


def test_hooks_registered_before_prepare() -> None:
    raw, _, batch = pair("BERT")
    seen: list[Tensor] = []
    for place in PLACES["BERT"]:
        on_forward(raw.get_submodule(place), seen)
        on_backward(raw.get_submodule(place), seen)
    step(raw, batch)
    wanted = len(seen)
    assert wanted > len(PLACES["BERT"])
    prepared = mvpfx.prepare(raw, half())
    for calls in (2, 3):
        step(prepared, batch)
        assert len(seen) == wanted * calls


def test_a_global_hook_sees_every_module() -> None:
    raw, prepared, batch = masked_pair("BERT")
    step(prepared, batch)
    counts: list[int] = []
    for model in (raw, prepared):
        names: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, names=names: names.append(type(m).__name__)
        )
        model(**batch)
        handle.remove()
        counts.append(len([name for name in names if name != "Mask"]))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", PLACES)
def test_hooks_on_the_gradients_of_weights(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    place = f"{PLACES[name][2]}.weight"
    mask = next(mask for mask in masks_of(prepared) if mask.site.name == place)
    seen: list[Seen] = [[], []]
    accumulated: list[Seen] = [[], []]
    for model, own, later in zip((raw, prepared), seen, accumulated, strict=True):
        weight = model.get_parameter(place)
        weight.register_hook(lambda g, own=own: (own.append(g.clone()), g * 2)[1])
        weight.register_post_accumulate_grad_hook(
            lambda p, later=later: later.append(p.grad.clone())
        )
    for model in (raw, prepared):
        step(model, batch)
    assert len(seen[0]) == len(seen[1]) == len(accumulated[1]) == 1
    assert_equal(seen[1][0], seen[0][0] * mask.mask())
    assert_equal(accumulated[1][0], 2 * seen[0][0] * mask.mask())


def test_an_optimizer_that_steps_in_the_backward_pass() -> None:
    raw, prepared, batch = pair("BERT")
    for model in (raw, prepared):
        model.eval()
        optimizers = {
            p: torch.optim.SGD([p], lr=0.1)
            for n, p in model.named_parameters()
            if not n.endswith("scores")
        }

        def hook(parameter: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(hook)
        for _ in range(3):
            step(model, batch)
    for name, parameter in raw.named_parameters():
        assert_equal(prepared.get_parameter(name), parameter, name)


def test_saved_tensor_hooks_around_a_model() -> None:
    raw, prepared, batch = masked_pair("BERT")
    with torch.autograd.graph.save_on_cpu():
        found, wanted = step(prepared, batch), step(raw, batch)
    assert_equal(output(found), output(wanted))
    assert_same_gradients(prepared, raw)
    assert all(region.calls for region in regions(copy.copy(prepared)))
