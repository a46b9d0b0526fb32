"""Mask: forward, straight-through gradients, what is kept where, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mvpfx.criterion import Targets
from mvpfx.granularity import from_matrix, to_matrix
from mvpfx.mask import Mask
from mvpfx.schedule import ConstantSchedule, CubicSchedule
from tests.toy_masks import make_mask, raises, values

LAYOUTS: list[tuple[tuple[int, ...], int]] = [
    ((6, 8), 0),
    ((8, 6), 1),
    ((6, 4, 1, 2), 0),
    ((4, 6, 2), 1),
]
GRANULARITIES: list[object] = ["element", (3, 2), (2, 4), "row", "column"]


def plain(mask: Mask, weight: Tensor) -> Tensor:
    """The masked weight by autograd alone: units of ones carry the gradient of the scores."""
    site = mask.site
    matrix = to_matrix(weight, site.out_dim)
    scores = mask.require_scores()
    units = mask.kept().float() + scores - scores.detach()
    return from_matrix(
        matrix * mask.granularity.expand(units, *matrix.shape), site.shape, site.out_dim
    )


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("shape", "out_dim"), LAYOUTS)
def test_forward_and_gradients(
    shape: tuple[int, ...], out_dim: int, granularity: object, density: float, device: str
) -> None:
    mask, weight = make_mask(values(*shape, device=device), granularity, out_dim)
    mask.density = density
    seen = mask(weight)
    assert seen.shape == weight.shape
    assert torch.equal(seen, weight * mask.mask())
    assert mask.mask().shape == weight.shape
    assert int(mask.kept().sum()) == round(density * mask.units)
    towards = values(*shape, seed=1, device=device)
    seen.backward(towards)
    found = [weight.grad, mask.require_scores().grad]
    weight.grad = mask.require_scores().grad = None
    plain(mask, weight).backward(towards)
    torch.testing.assert_close(found, [weight.grad, mask.require_scores().grad])


@given(
    units=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    density=st.floats(0.01, 1),
    seed=st.integers(0, 100),
)
def test_straight_through_is_what_autograd_gives(
    units: tuple[int, int], block: tuple[int, int], density: float, seed: int
) -> None:
    shape = (units[0] * block[0], units[1] * block[1])
    mask, weight = make_mask(values(*shape, seed=seed), block)
    mask.density = density
    target = values(*shape, seed=seed + 1)
    (mask(weight) - target).square().sum().backward()
    found = [weight.grad, mask.require_scores().grad]
    weight.grad = mask.require_scores().grad = None
    (plain(mask, weight) - target).square().sum().backward()
    torch.testing.assert_close(found, [weight.grad, mask.require_scores().grad])


@pytest.mark.parametrize("trains", ["weight", "scores", "neither"])
def test_only_what_trains_has_a_gradient(trains: str) -> None:
    mask, weight = make_mask(values(4, 4), (2, 2))
    mask.density = 0.5
    scores = mask.require_scores()
    weight.requires_grad_(trains == "weight")
    scores.requires_grad_(trains == "scores")
    seen = mask(weight)
    assert seen.requires_grad == (trains != "neither")
    if seen.requires_grad:
        seen.sum().backward()
    assert (weight.grad is not None, scores.grad is not None) == (
        trains == "weight",
        trains == "scores",
    )


def test_magnitude_gives_masked_weights_no_gradient() -> None:
    mask, weight = make_mask(values(4, 4), criterion="magnitude")
    mask.density = 0.5
    mask(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.mask().float())


def test_score_gradients_are_summed_in_float32() -> None:
    mask, weight = make_mask(torch.full((64, 64), 1.0).bfloat16(), (64, 64))
    mask.density = 1.0
    mask(weight).backward(torch.full((64, 64), 1.0 + 1 / 128).bfloat16())
    grad = mask.require_scores().grad
    assert grad is not None
    assert grad.item() == 4096 * (1 + 1 / 128)


def test_scores_and_progress_are_saved() -> None:
    mask, _ = make_mask(values(4, 4), (2, 2))
    assert list(mask.state_dict()) == ["scores", "progress"]
    assert [name for name, _ in mask.named_parameters()] == ["scores"]
    other, weight = make_mask(values(4, 4, seed=1), (2, 2))
    mask.aim(Targets(density=0.5), 3)
    other(weight)
    other.load_state_dict(mask.state_dict())
    assert (other.density, other.step) == (0.5, 3)
    assert torch.equal(other.kept(), mask.kept())
    assert other.kept().sum() == 2


def test_a_state_without_progress_leaves_it_as_it_is() -> None:
    mask, _ = make_mask(values(4, 4), (2, 2))
    mask.aim(Targets(density=0.5), 3)
    mask.load_state_dict({"scores": mask.require_scores().detach() + 1})
    assert (mask.density, mask.step) == (0.5, 3)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_scores_as_they_are(to: torch.dtype) -> None:
    mask, weight = make_mask(values(8, 8))
    before = mask.require_scores().detach().clone()
    holder = nn.Module()
    holder.mask, holder.weight = mask, weight
    holder.to(to)
    assert torch.equal(mask.require_scores(), before)
    assert mask.require_scores().dtype == torch.float32
    assert mask(weight).dtype == weight.dtype == to


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_move_with_the_model() -> None:
    mask, weight = make_mask(values(8, 8))
    mask.density = 0.5
    kept = mask.kept()
    holder = nn.Module()
    holder.mask, holder.weight = mask, weight
    holder.to("cuda", torch.bfloat16)
    assert mask.require_scores().device.type == "cuda"
    assert mask(weight).device.type == "cuda"
    assert torch.equal(mask.kept().cpu(), kept)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("criterion", ["movement", "magnitude"])
def test_a_copy_lives_on_its_own(how: str, criterion: str) -> None:
    mask, weight = make_mask(values(4, 4), criterion=criterion)
    mask.density = 0.5
    holder = nn.ModuleDict({"mask": mask})
    holder.register_parameter("weight", weight)
    before = mask(weight).detach()
    twin: Any = copy.deepcopy(holder) if how == "deepcopy" else pickle.loads(pickle.dumps(holder))
    assert torch.equal(twin["mask"](twin.weight), before)
    assert twin["mask"]._weight is twin.weight is not weight
    with torch.no_grad():
        twin.weight.copy_(values(4, 4, seed=1))
        if criterion == "movement":
            twin["mask"].require_scores().neg_()
    assert not torch.equal(twin["mask"].kept(), mask.kept())
    assert torch.equal(mask(weight), before)


def test_the_mask_is_computed_once_until_something_changes() -> None:
    mask, weight = make_mask(values(4, 4))
    mask.density = 0.5
    first = mask.kept()
    product = mask(weight)
    assert mask.kept() is first
    product.sum().backward()
    assert torch.equal(mask.kept(), first)
    with torch.no_grad():
        mask.require_scores().neg_()
    second = mask.kept()
    assert not torch.equal(first, second)
    mask.density = 0.25
    assert int(mask.kept().sum()) == 4
    mask.density = 0.5
    mask.require_scores().data.neg_()  # past autograd's version counter
    mask.eval()
    assert torch.equal(mask.kept(), first)


def test_blocks_are_expanded_anew_only_where_others_stay() -> None:
    mask, _ = make_mask(values(8, 8), granularity=(4, 2))
    mask.density = 0.5
    first = mask.mask()
    mask.forget()
    assert mask.mask() is first
    with torch.no_grad():
        mask.require_scores().neg_()
    assert torch.equal(mask.mask(), ~first), "the other half"


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    mask, weight = make_mask(values(4, 4))
    mask.density = 0.5
    with torch.inference_mode():
        mask(weight)
    mask(weight).sum().backward()
    assert mask.require_scores().grad is not None


def test_a_weight_that_was_replaced() -> None:
    mask, _ = make_mask(values(4, 4), criterion="magnitude")
    mask.density = 0.25
    other = nn.Parameter(torch.eye(4))
    assert torch.equal(mask(other), torch.eye(4))


def test_plans() -> None:
    mask, _ = make_mask(values(4, 4), density=0.25)
    assert (mask.plan, mask.density) == (None, 1.0)
    mask.plan = CubicSchedule()
    assert mask.density == 1.0
    mask.plan = ConstantSchedule()
    assert mask.density == 0.25
    soft, _ = make_mask(values(4, 4), criterion="soft_movement", penalty_lambda=100.0)
    soft.plan = CubicSchedule()
    assert (soft.threshold, soft.penalty_lambda, soft.density) == (0.0, 0.0, None)
    assert repr(soft) == "Mask(ffn.weight, soft_movement, threshold=0)"
    steered, _ = make_mask(values(4, 4), criterion="soft_movement", density=0.25)
    steered.plan = CubicSchedule()
    assert (steered.threshold, steered.steered, steered.density) == (0.1, 1.0, None)
    assert repr(mask) == "Mask(ffn.weight, movement, density=0.25)"
    mask.plan = None
    with raises(ValueError, "the mask of ffn.weight has no schedule. Set its plan first."):
        mask.set_step(1, 2)
