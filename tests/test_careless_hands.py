"""Careless calls: the right one is shown, or a warning names the remedy."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import nn

import mvpfx
from tests.toy_masks import raises

X = torch.linspace(-1, 1, 48).view(3, 16)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int, penalty: bool) -> None:
    for _ in range(steps):
        loss = model(X).square().sum()
        (loss + mvpfx.penalty(model) if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def test_keywords_make_the_configuration() -> None:
    model = mvpfx.prepare(layers(), density=0.1, criterion="magnitude")
    assert {m.rule.density for m in model.modules() if hasattr(m, "rule")} == {0.1}  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (
            (0.1,),
            {},
            "prepare needs a PruningConfig or keywords; found 0.1 (float). "
            "Call mvpfx.prepare(model, density=0.1).",
        ),
        (
            ({"density": 0.1},),
            {},
            "prepare needs a PruningConfig or keywords; found {'density': 0.1} (dict). "
            "Call mvpfx.prepare(model, **config).",
        ),
        (
            (),
            {"sparsity": 0.9},
            "a configuration has no field 'sparsity'. density is the fraction that is kept: "
            "mvpfx.prepare(model, density=0.1).",
        ),
        ((), {"densty": 0.9}, "a configuration has no field 'densty'. Did you mean density=?"),
        (
            (mvpfx.PruningConfig(),),
            {"density": 0.1},
            "prepare was given a PruningConfig and density besides. Put all into one of them: "
            "PruningConfig(density=..., ...).",
        ),
    ],
)
def test_wrong_calls_show_the_right_one(
    arguments: tuple[Any, ...], fields: dict[str, Any], message: str
) -> None:
    with raises(TypeError, message):
        mvpfx.prepare(layers(), *arguments, **fields)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    count: Any = numpy.int64(7)
    scheduler = mvpfx.SparsityScheduler(mvpfx.prepare(layers()), count)
    assert scheduler.total_steps == 7 and type(scheduler.total_steps) is int


@pytest.mark.parametrize("when", ["before prepare", "score learning rate of 0", "right"])
def test_scores_that_no_optimizer_moves(when: str) -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mvpfx.prepare(model, density=0.5, score_init="magnitude")
    if when != "before prepare":
        groups = mvpfx.parameter_groups(model, lr=1e-2)
        groups[-1]["lr"] *= when == "right"
        optimizer = torch.optim.AdamW(groups)
    scheduler = mvpfx.SparsityScheduler(model, 8)
    if when == "right":
        return train(model, optimizer, scheduler, 8, False)
    with pytest.warns(UserWarning, match="Make the optimizer after mvpfx.prepare") as said:
        train(model, optimizer, scheduler, 8, False)
    assert len(said) == 1
    return None


def test_groups_whose_scores_do_not_learn() -> None:
    model = mvpfx.prepare(layers())
    with pytest.warns(UserWarning, match="score_lr=0 never moves the scores"):
        mvpfx.parameter_groups(model, lr=1e-3, score_lr=0)
    mvpfx.parameter_groups(mvpfx.prepare(layers(), criterion="magnitude"), lr=1e-3, score_lr=0)


@pytest.mark.parametrize("criterion", ["soft_movement", "l0"])
def test_a_penalty_that_is_never_added(criterion: str) -> None:
    for added in (True, False):
        model = mvpfx.prepare(layers(), criterion=criterion, penalty_lambda=1.0)
        optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-2))
        scheduler = mvpfx.SparsityScheduler(model, 14)
        if added:
            train(model, optimizer, scheduler, 14, True)
            continue
        with pytest.warns(UserWarning, match="needs its penalty in the loss"):
            train(model, optimizer, scheduler, 14, False)


@pytest.mark.parametrize("steps", [0, 4, 12])
def test_converting_before_the_end_of_the_schedule(steps: int) -> None:
    model = mvpfx.prepare(layers(), density=0.1)
    scheduler = mvpfx.SparsityScheduler(model, 12)
    for _ in range(steps):
        scheduler.step()
    if steps == 12:
        mvpfx.convert(model.eval(), example_inputs=X, lowering="dense")
        return
    with pytest.warns(UserWarning, match="where the configuration asks for 10%"):
        mvpfx.convert(model.eval(), example_inputs=X, lowering="dense")


def test_masks_and_scores_by_site() -> None:
    model = mvpfx.prepare(layers(), density=0.25, schedule=mvpfx.ConstantSchedule())
    masks, scores = mvpfx.masks(model), mvpfx.scores(model)
    assert set(masks) == set(scores) == {"0.weight", "2.weight"}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == model.get_parameter(name).shape
        assert float(mask.float().mean()) == pytest.approx(0.25, abs=1e-2)
        assert scores[name].shape == mask.shape and not scores[name].requires_grad
        mask.zero_()
        scores[name].zero_()
    assert all(mask.any() for mask in mvpfx.masks(model).values())
    assert mvpfx.scores(mvpfx.prepare(layers(), criterion="magnitude")) == {}
    with pytest.raises(ValueError, match="neither prepared nor converted"):
        mvpfx.masks(layers())
