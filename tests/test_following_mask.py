"""Hidden channels with one score each, in all the weights that make and read them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx import criteria
from mvpfx.mask import Mask
from tests.toy_masks import raises
from tests.training import half, masks_of
from tests.zoo import ZOO

HIDDEN = 12
X = torch.linspace(-1, 1, 40).view(5, 8)
COUPLING = [name for name in criteria.names() if criteria.find(name).couples]


class Gated(nn.Module):
    """`down(act(gate(x)) * up(x))`, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(8, HIDDEN), nn.Linear(8, HIDDEN)
        self.down = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def prepared(model: nn.Module | None = None, **fields: Any) -> Any:
    """A model with channels, half of which stay unless `fields` say otherwise."""
    usual: dict[str, Any] = {"granularity": "channel", "density": 0.5}
    usual["schedule"] = mvpfx.ConstantSchedule()
    config = mvpfx.PruningConfig(**(usual | fields))
    return mvpfx.prepare(model or Gated(), config, example_inputs=X)


def by_channel(model: Any) -> list[list[bool]]:
    """Which channels each weight keeps."""
    return [mask.kept().flatten().tolist() for mask in masks_of(model)]


def train(model: Any, steps: int = 4) -> mvpfx.SparsityScheduler:
    """A few steps of Adam on a loss that moves all weights."""
    scheduler = mvpfx.SparsityScheduler(model, total_steps=max(steps, 1))
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-2, score_lr=0.1))
    for step in range(steps):
        loss = (model(X) - torch.sin(X[:, :4] * (step + 1))).square().mean()
        (loss + mvpfx.penalty(model)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return scheduler


def test_one_parameter_scores_all_three_weights() -> None:
    model = prepared()
    assert [n for n, _ in model.named_parameters() if "scores" in n] == ["down.weight_mask.scores"]
    assert model.down.weight_mask.scores.shape == (1, HIDDEN)
    assert [mask.granularity.units_shape(mask.site) for mask in masks_of(model)] == [
        (HIDDEN, 1),
        (HIDDEN, 1),
        (1, HIDDEN),
    ]
    assert len({tuple(kept) for kept in by_channel(model)}) == 1
    assert sum(by_channel(model)[0]) == HIDDEN // 2


def test_scores_receive_what_moves_in_all_weights() -> None:
    """DS = sum over the weights of dL/dW' * W, summed over what a channel has of each."""
    model = prepared(score_init="zero")
    kept = np.array(by_channel(model)[0])
    model(X).square().sum().backward()
    gate, up, down = (layer.weight.detach().numpy() for layer in (model.gate, model.up, model.down))
    biases = [layer.bias.detach().numpy() for layer in (model.gate, model.up, model.down)]
    x = X.numpy()
    a, b = x @ (gate * kept[:, None]).T + biases[0], x @ (up * kept[:, None]).T + biases[1]
    sigmoid = 1 / (1 + np.exp(-a))
    h = a * sigmoid * b
    grad_y = 2 * (h @ (down * kept).T + biases[2])
    grad_h = grad_y @ (down * kept)
    grad_a = grad_h * b * (sigmoid + a * sigmoid * (1 - sigmoid))
    grad_b = grad_h * a * sigmoid
    wanted = ((grad_a.T @ x) * gate).sum(1) + ((grad_b.T @ x) * up).sum(1)
    wanted += ((grad_y.T @ h) * down).sum(0)
    found = model.down.weight_mask.scores.grad
    assert found is not None
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_scores_from_zero_train() -> None:
    model = prepared(score_init="zero")
    before = by_channel(model)
    assert before[0] == [True] * 6 + [False] * 6  # ties go to lower indices
    train(model, steps=20)
    assert bool((model.down.weight_mask.scores != 0).all())
    assert by_channel(model) != before


def test_magnitude_is_the_mean_over_all_weights() -> None:
    model = prepared(criterion="magnitude")
    sums = sum(abs(layer.weight.detach().numpy()).sum(1) for layer in (model.gate, model.up))
    mean = (sums + abs(model.down.weight.detach().numpy()).sum(0)) / (8 + 8 + 4)
    assert by_channel(model)[0] == (mean >= np.sort(mean)[HIDDEN // 2]).tolist()
    least = int(mean.argmin())
    with torch.no_grad():
        model.gate.weight[least] += 100.0  # a follower's weight
    assert by_channel(model)[0][least] and len({tuple(k) for k in by_channel(model)}) == 1


@pytest.mark.parametrize("criterion", COUPLING)
def test_every_criterion(criterion: str) -> None:
    torch.manual_seed(0)
    schedule = mvpfx.CubicSchedule(warmup=2, cooldown=3)
    model = prepared(criterion=criterion, schedule=schedule, density=0.25, threshold=0.6)
    train(model, steps=25)
    kept = by_channel(model.eval())
    assert kept[0] == kept[1] == kept[2]
    if criteria.find(criterion).pooled:
        assert sum(kept[0]) == HIDDEN // 4
    small: Any = mvpfx.convert(model, example_inputs=X)
    assert small.down.weight.shape == (4, sum(kept[0]))
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-6)


def test_l0_gates_what_reads() -> None:
    model = prepared(criterion="l0")
    with torch.no_grad():
        model.down.weight_mask.scores[:, :6] = -9.0  # shut in every draw
    model.train()
    opened = [model.down.weight_mask(model.down.weight) for _ in range(2)]
    assert not torch.equal(*opened) and not opened[0][:, :6].any()
    assert model.up.weight_mask(model.up.weight) is model.up.weight
    model.eval()
    assert not model.up.weight_mask(model.up.weight)[:6].any()


@pytest.mark.parametrize("options", [{"freeze": True}, {"rewind_to": 1}])
def test_freezing_and_rewinding(options: dict[str, Any]) -> None:
    if "freeze" in options:
        schedule: Any = mvpfx.LinearSchedule(warmup=1, cooldown=3, freeze=True)
    else:
        schedule = mvpfx.StepSchedule(warmup=1, cooldown=1, cuts=2, rewind_to=1)
    model = prepared(schedule=schedule, criterion="magnitude")
    names = [name.rpartition(".")[2] for name in model.state_dict() if "_mask" in name]
    wanted = ["frozen_kept"] if "freeze" in options else ["remembered_weight"] * 3
    assert [name for name in names if name != "progress"] == wanted
    train(model, steps=6)
    with torch.no_grad():
        model.up.weight.normal_()
    kept = by_channel(model)
    assert kept[0] == kept[1] == kept[2]


def test_copies_and_checkpoints(tmp_path: Path) -> None:
    model = ZOO["BERT"].model()
    config = half(granularity="hybrid", scope="global", score_init="zero")
    mvpfx.prepare(model, config)
    for mask in masks_of(model):
        if mask.leader is None:
            torch.nn.init.normal_(mask.require_scores())
    twin = copy.deepcopy(model)
    assert [mask.leader for mask in masks_of(twin) if mask.leader is not None] == [
        twin.get_submodule(f"{mask.leader.site.name}_mask")
        for mask in masks_of(model)
        if mask.leader is not None
    ]
    other = mvpfx.prepare(ZOO["BERT"].model(), config)
    other.load_state_dict(model.state_dict())
    for one in (twin, other):
        for mask, found in zip(masks_of(model), masks_of(one), strict=True):
            assert torch.equal(mask.mask(), found.mask())


@pytest.mark.parametrize("criterion", ["movement", "platon", "ema_magnitude"])
def test_a_resumed_run_is_the_same(criterion: str, tmp_path: Path) -> None:
    schedule = mvpfx.CubicSchedule(warmup=1, cooldown=1, freeze=True)

    def start() -> tuple[Any, dict[str, Any]]:
        model = prepared(criterion=criterion, schedule=schedule, density=0.25)
        optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-2, score_lr=0.1))
        return model, {"optimizer": optimizer, "scheduler": mvpfx.SparsityScheduler(model, 8)}

    def run(model: Any, parts: dict[str, Any], steps: int) -> None:
        for _ in range(steps):
            model(X).square().mean().backward()
            for part in parts.values():
                part.step()
            parts["optimizer"].zero_grad()

    model, parts = start()
    run(model, parts, 4)
    mvpfx.save_checkpoint(tmp_path / "checkpoint-4", model, **parts)
    run(model, parts, 4)
    resumed, others = start()
    mvpfx.load_checkpoint(tmp_path / "checkpoint-4", resumed, **others)
    run(resumed, others, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert by_channel(resumed) == by_channel(model)


def test_global_scope_counts_a_channel_once() -> None:
    model = ZOO["BERT"].model()
    mvpfx.prepare(model, half(granularity="channel", scope="global", criterion="magnitude"))
    leading = [mask for mask in masks_of(model) if mask.leader is None]
    assert {len(mask.ranking.masks) for mask in masks_of(model)} == {len(leading)}
    units = sum(mask.units for mask in leading)
    assert sum(int(mask.kept().sum()) for mask in leading) == round(0.5 * units)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    model = prepared()
    eager = model(X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), eager)
    compiled(X).sum().backward()
    first = model.down.weight_mask.scores.grad.clone()
    model.zero_grad()
    model(X).sum().backward()
    torch.testing.assert_close(model.down.weight_mask.scores.grad, first)


def test_what_is_shared_must_agree() -> None:
    with raises(
        ValueError,
        "up.weight has density=0.2 and down.weight density=0.5, but they share the scores of their "
        "hidden channels. Let overrides change both, or give one of them another granularity, such "
        'as "row".',
    ):
        prepared(overrides={"up": {"density": 0.2}})


def test_second_order_scores_weights_one_by_one() -> None:
    with raises(
        ValueError,
        'down.weight: criterion "second_order" scores each weight by itself, and granularity '
        '"channel" all weights of a channel together. Use another criterion, such as "movement", '
        'or granularity "column" there.',
    ):
        prepared(criterion="second_order")


def test_without_the_weight_that_reads() -> None:
    model = prepared(overrides={"down": None})
    assert [n for n, _ in model.named_parameters() if "scores" in n] == ["gate.weight_mask.scores"]
    assert by_channel(model)[0] == by_channel(model)[1]


def test_fused_halves_share_a_score() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.both, self.down = nn.Linear(8, 2 * HIDDEN), nn.Linear(HIDDEN, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)

    model = prepared(Fused())
    assert isinstance(model.both.weight_mask, Mask)
    halves = model.both.weight_mask.mask().view(2, HIDDEN, 8)
    assert torch.equal(halves[0], halves[1])
    assert torch.equal(halves[0][:, 0], model.down.weight_mask.mask()[0])
    small: Any = mvpfx.convert(model, example_inputs=X)
    assert small.both.weight.shape == (HIDDEN, 8)
