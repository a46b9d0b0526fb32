"""Parameter groups: who is in which, once, at which rate."""

from typing import Any

import pytest
import torch
from torch import nn

from mvpfx.optim import parameter_groups
from mvpfx.state import State, attach_state, find_state
from tests.toy_masks import Stack, raises, values


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm([2, 6])
        self.stack = Stack(values(6, 6), values(6, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 4)
        self.head.weight = self.embedding.weight


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


def test_each_parameter_once_in_its_group() -> None:
    model = Model()
    groups = by_name(parameter_groups(model, lr=3e-5, score_lr=1e-2, weight_decay=0.1))
    assert list(groups) == ["weights", "no_decay", "scores"]
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"weights": (3e-5, 0.1), "no_decay": (3e-5, 0.0), "scores": (1e-2, 0.0)}

    def members(name: str) -> set[int]:
        return {id(parameter) for parameter in groups[name]["params"]}

    stack = model.stack
    assert members("weights") == {id(model.embedding.weight), *map(id, stack.weights)}
    assert members("no_decay") == {id(p) for p in (*model.norm.parameters(), model.head.bias)}
    assert members("scores") == {id(mask.scores) for mask in stack.mask_list}
    everything = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_optimizers_take_them() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    scores = model.stack.mask_list[0].require_scores()
    before = scores.detach().clone()
    scores.grad = torch.zeros_like(scores)
    optimizer.step()
    assert torch.equal(scores, before), "no decay"


def test_groups_that_would_be_empty_are_left_out() -> None:
    assert list(by_name(parameter_groups(nn.Linear(2, 2, bias=False), lr=1e-3))) == ["weights"]
    magnitude = Stack(values(2, 2), criterion="magnitude")
    assert list(by_name(parameter_groups(magnitude, lr=1e-3))) == ["weights"]


def test_the_model_remembers() -> None:
    model = Model()
    attach_state(model, State())
    parameter_groups(model, lr=1e-3)
    state = find_state(model)
    assert state is not None
    assert state.optimizer_built


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ({"lr": -1}, ValueError, "lr must be at least 0; found -1."),
        ({"lr": "1e-3"}, TypeError, "lr must be a number; found '1e-3' (str)."),
        ({"lr": 1, "score_lr": float("nan")}, ValueError, "score_lr must be finite; found nan."),
        (
            {"lr": 1, "weight_decay": True},
            TypeError,
            "weight_decay must be a number; found True (bool).",
        ),
    ],
)
def test_bad_rates(rates: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        parameter_groups(Model(), **rates)
