"""Which calls share a graph: what a signature must tell apart, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mvpfx.signature import Configuration, flatten
from mvpfx.torch_private import pytree


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(implementation="sdpa", problem_type=None)
        self.scale = 2.0
        self.sizes = [1, 2]
        self.switches = {"causal": True, "rates": [0.1]}
        self.options = SimpleNamespace(depth=2, inner=SimpleNamespace(causal=True))
        self.table = torch.ones(2)
        self.linear = nn.Linear(2, 2)


def outer() -> Any:
    return nn.Sequential(Inner(), nn.Dropout(0.1))


def nothing(*_: object) -> None:
    """A hook."""


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda m: setattr(m[0], "scale", 3.0),
    "a new attribute": lambda m: setattr(m[0], "flag", True),
    "an entry of a list": lambda m: m[0].sizes.append(3),
    "an entry of a config": lambda m: setattr(m[0].config, "implementation", "eager"),
    "an entry of a dictionary": lambda m: m[0].switches.update(causal=False),
    "a name in a dictionary": lambda m: m[0].switches.update(other=m[0].switches.pop("causal")),
    "a list in a dictionary": lambda m: m[0].switches["rates"].append(0.2),
    "an option": lambda m: setattr(m[0].options, "depth", 3),
    "an option of an option": lambda m: setattr(m[0].options.inner, "causal", False),
    "another config": lambda m: setattr(m[0], "config", SimpleNamespace(implementation="eager")),
    "the rate of a leaf": lambda m: setattr(m[1], "p", 0.2),
    "the mode": lambda m: m[1].eval(),
    "another child": lambda m: setattr(m[0], "linear", nn.Linear(2, 2)),
    "a new child": lambda m: m.append(nn.ReLU()),
    "another class": lambda m: setattr(m[1], "__class__", nn.AlphaDropout),
    "a forward hook": lambda m: m[0].linear.register_forward_hook(nothing),
    "a backward hook": lambda m: m[0].linear.register_full_backward_hook(nothing),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_a_forward_may_branch_on_is_told_apart(change: Callable[[Any], Any]) -> None:
    model, configuration = outer(), Configuration()
    before = configuration.number(model)
    assert configuration.number(model) == before
    change(model)
    assert configuration.number(model) != before


def test_what_was_before_is_known_again() -> None:
    model, configuration = outer(), Configuration()
    before = configuration.number(model)
    model.eval()
    assert configuration.number(model) != before
    model.train()
    assert configuration.number(model) == before
    handle = model[0].linear.register_forward_hook(nothing)
    assert configuration.number(model) != before
    handle.remove()
    assert configuration.number(model) == before


def test_tensors_and_what_task_heads_write_are_not_part_of_it() -> None:
    model, configuration = outer(), Configuration()
    before = configuration.number(model)
    model[0].table = torch.zeros(2)
    model[0].config.problem_type = "regression"
    with torch.no_grad():
        model[0].linear.weight.mul_(2.0)
    assert configuration.number(model) == before


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "leaves": ((torch.ones(1), None, 2), {"scale": 1.0, "mask": torch.zeros(1)}),
    "a tuple": ((torch.ones(1),), {"position": (torch.ones(2), torch.ones(3)), "flag": True}),
    "no argument": ((), {}),
    "a list": (([torch.ones(1), 2],), {"last": 3}),
    "nested": ((torch.ones(1), {"a": (1, (2, 3))}), {"b": [4]}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_leaves_come_in_the_order_of_pytree(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    wanted, _ = pytree.tree_flatten(call)
    found, _ = flatten(*call)
    assert len(found) == len(wanted)
    assert all(a is b for a, b in zip(found, wanted, strict=True))


def test_nestings_of_the_same_leaves_are_told_apart() -> None:
    a, b = torch.ones(1), torch.ones(1)
    calls: list[Any] = [((a, b), {}), (((a, b),), {}), (([a, b],), {}), ((a,), {"x": b})]
    calls += [((a,), {"y": b}), ((), {"x": a, "y": b}), (((a,), b), {}), ((a, (b,)), {})]
    nestings = [flatten(*call)[1] for call in calls]
    assert len(set(nestings)) == len(calls)
