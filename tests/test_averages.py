"""Averages, blends and states of prepared models: how far masks have come goes with the weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mvpfx

X = torch.linspace(-1, 1, 48).view(3, 16)
Follow = Callable[[nn.Module, nn.Module], nn.Module]


def trained(steps: int, **fields: object) -> tuple[nn.Module, nn.Module]:
    """A model after so many steps of twelve, and an average that followed it all the time."""
    torch.manual_seed(0)
    model = new(**fields)
    scheduler = mvpfx.SparsityScheduler(model, 12)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update_parameters(model)
    return model.eval(), average.eval()


def new(**fields: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"density": 0.25, "schedule": mvpfx.LinearSchedule(), **fields}
    return mvpfx.prepare(model, mvpfx.PruningConfig(**options), example_inputs=X)  # pyright: ignore[reportArgumentType]


def density(model: nn.Module) -> list[float]:
    return [m.density_now for m in model.modules() if hasattr(m, "density_now")]  # pyright: ignore[reportReturnType]


def loaded(model: nn.Module, average: nn.Module) -> nn.Module:
    other = new()
    other.load_state_dict(model.state_dict())
    return other.eval()


def through_a_file(model: nn.Module, average: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = new()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other.eval()


def blended(model: nn.Module, average: nn.Module) -> nn.Module:
    first, second = model.state_dict(), average.get_submodule("module").state_dict()
    other = new()
    other.load_state_dict({name: 0.5 * (first[name] + second[name]) for name in first})
    return other.eval()


def assigned(model: nn.Module, average: nn.Module) -> nn.Module:
    other = new()
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other.eval()


WAYS: dict[str, Follow] = {
    "average": lambda model, average: average.get_submodule("module"),
    "deepcopy": lambda model, average: copy.deepcopy(model),
    "state dict": loaded,
    "file": through_a_file,
    "blend": blended,
    "assign": assigned,
}


@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("way", WAYS)
def test_the_density_goes_along(way: str, steps: int) -> None:
    model, average = trained(steps)
    other = WAYS[way](model, average)
    assert density(other) == pytest.approx(density(model), abs=1e-6)
    assert max(density(other)) < 1
    told = pytest.warns(UserWarning, match="the schedule has not come to its end")
    with told if steps < 12 else nullcontext():
        small = mvpfx.convert(other, example_inputs=X, lowering="dense")
    torch.testing.assert_close(small(X), other(X))
    left = sum(int((p != 0).sum()) for p in small.parameters() if p.dim() == 2)
    assert left <= sum(fraction * 16 * 32 / (1, 2)[i] for i, fraction in enumerate(density(model)))
    if way not in ("average", "blend"):
        assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("kind", [torch.half, torch.bfloat16, torch.double])
def test_casting_keeps_progress_exact(kind: torch.dtype) -> None:
    model, _ = trained(7)
    wanted = density(model)
    assert density(model.to(kind)) == wanted
    other = new().to(kind)
    other.load_state_dict(model.state_dict())
    assert density(other) == wanted


def test_a_frozen_mask_stays_frozen() -> None:
    schedule = mvpfx.LinearSchedule(cooldown=0.5, freeze=True)
    model, _ = trained(9, schedule=schedule)
    other = new(schedule=schedule)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("scores"):
                parameter.neg_()
    assert torch.equal(other.eval()(X), model(X))


def test_an_average_of_tensors_alone_is_not_fooled() -> None:
    model, _ = trained(12)
    vector: Tensor = nn.utils.parameters_to_vector(model.parameters())
    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(vector, other.parameters())
    assert torch.equal(other(X), model(X))
