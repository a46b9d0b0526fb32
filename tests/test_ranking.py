"""Ranking: exact counts under ties, in one weight and across a pool."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mvpfx
from mvpfx.mask import Mask
from mvpfx.ranking import rank_together, top_v
from mvpfx.schedule import CubicSchedule
from mvpfx.torch_private import is_fake
from tests import reference
from tests.toy_masks import Stack, make_mask, raises, values

PARTS = st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=12), min_size=1, max_size=4)


def oracle(scores: list[Tensor], count: int) -> list[Tensor]:
    parts = [part.cpu().double().numpy() for part in scores]
    return [torch.from_numpy(mask) for mask in reference.top_v(parts, count)]


@given(parts=PARTS, share=st.floats(0, 1))
def test_top_v_is_exact_under_ties(parts: list[list[int]], share: float) -> None:
    scores = [torch.tensor(part, dtype=torch.float32) for part in parts]
    count = round(share * sum(map(len, parts)))
    kept = top_v(scores, count)
    assert sum(int(part.sum()) for part in kept) == count
    for found, expected in zip(kept, oracle(scores, count), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 37, 4799, 4800])
def test_top_v_of_many(dtype: torch.dtype, count: int, device: str) -> None:
    scores = [
        values(60, 40, device=device).to(dtype),
        values(48, 50, seed=1, device=device).to(dtype),
    ]
    scores[1][:10] = scores[0][:10, :].reshape(-1)[:50]
    for found, expected in zip(top_v(scores, count), oracle(scores, count), strict=True):
        assert found.device == scores[0].device
        assert torch.equal(found.cpu(), expected)


def test_infinite_scores_rank_where_they_belong() -> None:
    scores = torch.tensor([1.0, float("inf"), -float("inf"), 2.0])
    assert top_v([scores], 2)[0].tolist() == [False, True, False, True]


def test_scores_are_left_as_they_were() -> None:
    scores = values(5, 5)
    before = scores.clone()
    top_v([scores], 7)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.37, 0.05, 0.01])
@pytest.mark.parametrize("score_init", ["zero", "magnitude", 0.3])
def test_a_stack_keeps_exactly_what_is_asked(
    scope: str, density: float, score_init: str | float, device: str
) -> None:
    weights = [values(6, 8, seed=i, device=device) for i in range(3)]
    stack = Stack(*weights, density=density, scope=scope, score_init=score_init, granularity=(2, 2))
    for mask in stack.mask_list:
        mask.set_step(10, 10)
    kept = [int(mask.kept().sum()) for mask in stack.mask_list]
    if scope == "local":
        assert kept == [round(density * 12)] * 3
    else:
        assert sum(kept) == round(density * 36)
    if score_init != "magnitude" and scope == "global":
        assert kept == sorted(kept, reverse=True), "ties go to earlier sites"


def test_global_scope_moves_density_to_where_scores_are_high() -> None:
    stack = Stack(
        values(4, 4), values(4, 4, seed=1), density=0.5, scope="global", score_init="zero"
    )
    first, second = stack.mask_list
    with torch.no_grad():
        first.require_scores().fill_(-1)
    for mask in stack.mask_list:
        mask.set_step(1, 1)
    assert (first.density_now, second.density_now) == (0.0, 1.0)
    with torch.no_grad():
        first.require_scores()[0] = 2.0
    assert (first.density_now, second.density_now) == (0.25, 0.75)


@pytest.mark.parametrize("out_dim", [0, 1])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("text", ["2:4", "1:2", "3:8"])
def test_n_of_m_stay_among_neighbouring_inputs(text: str, scope: str, out_dim: int) -> None:
    keep, size = (int(number) for number in text.split(":"))
    mask, weight = make_mask(
        values(16, 24), text, out_dim, criterion="magnitude", density=keep / size, scope=scope
    )
    mask.plan = CubicSchedule(warmup=0, cooldown=0)
    matrix = weight.detach() if out_dim == 0 else weight.detach().t()
    order = matrix.abs().unflatten(1, (-1, size)).argsort(2, descending=True)
    best = torch.zeros_like(order, dtype=torch.bool).scatter(2, order[..., :keep], True).flatten(1)
    for step in range(9):
        mask.set_step(step, 8)
        kept = mask.kept()
        assert mask.density is not None
        assert int(kept.sum()) == round(mask.density * kept.numel()), "as smooth as any other"
        assert kept[best].all(), "the best of each group stay longest"
    assert torch.equal(mask.kept(), best)
    assert torch.equal(mask.mask() if out_dim == 0 else mask.mask().t(), best)


def test_who_is_ranked_together() -> None:
    def mask(**fields: Any) -> Mask:
        return make_mask(values(2, 2), **fields)[0]

    local = [mask(), mask()]
    pool = [mask(scope="global"), mask(scope="global", granularity=(2, 1))]
    other_density = mask(scope="global", density=0.5)
    other_criterion = mask(scope="global", criterion="magnitude")
    soft = [mask(scope="global", criterion="soft_movement") for _ in range(2)]
    groups = [make_mask(values(2, 4), "2:4", scope="global", density=0.5)[0] for _ in range(2)]
    rankings = rank_together([*local, *pool, other_density, other_criterion, *soft, *groups])
    assert [len(ranking.masks) for ranking in rankings] == [1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert pool[0].ranking is pool[1].ranking


def test_members_of_a_pool_need_one_density() -> None:
    stack = Stack(values(2, 2), values(2, 2), scope="global")
    stack.mask_list[1].density = 0.5
    message = (
        "stack.1.weight has density 0.5 and stack.0.weight has 1.0, but they are ranked together. "
        "Set the density of all masks of a pool, or use SparsityScheduler, which does."
    )
    with raises(ValueError, message):
        stack.mask_list[0].kept()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_a_pool_of_its_own(how: str) -> None:
    stack = Stack(values(4, 4), values(4, 4, seed=1), scope="global", density=0.5)
    for mask in stack.mask_list:
        mask.set_step(1, 1)
    before = [mask.kept().clone() for mask in stack.mask_list]
    twin = copy.deepcopy(stack) if how == "deepcopy" else pickle.loads(pickle.dumps(stack))
    assert isinstance(twin, Stack)
    assert twin.mask_list[0].ranking.masks[1] is twin.mask_list[1]
    with torch.no_grad():
        twin.mask_list[0].require_scores().add_(10)
    assert twin.mask_list[0].density_now == 1.0
    assert all(torch.equal(m.kept(), b) for m, b in zip(stack.mask_list, before, strict=True))


def pooled_model() -> tuple[Any, list[Mask]]:
    layers = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
    config = mvpfx.PruningConfig(
        density=0.5, scope="global", criterion="magnitude", schedule=mvpfx.ConstantSchedule()
    )
    model = mvpfx.prepare(nn.Sequential(*layers), config).eval()
    mvpfx.SparsityScheduler(model, total_steps=1)
    return model, [module for module in model.modules() if isinstance(module, Mask)]


def test_a_forward_looks_once_at_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pooled_model()
    model(torch.ones(1, 8))
    looks: list[str] = []
    own_state = Mask.own_state

    def counted(mask: Mask) -> Any:
        looks.append(mask.site.name)
        return own_state(mask)

    monkeypatch.setattr(Mask, "own_state", counted)
    for _ in range(2):
        looks.clear()
        model(torch.ones(1, 8))
        assert looks == [mask.site.name for mask in masks]


def test_what_is_written_between_two_forwards_moves_the_masks_of_all() -> None:
    model, masks = pooled_model()
    x = torch.ones(1, 8)
    model(x)
    before = masks[-1].mask().sum()
    model[0](x)  # looks at the pool, and leaves the others where they are
    with torch.no_grad():
        model[0][0].weight.mul_(1e3)
    found = model(x)
    assert int(masks[0].mask().sum()) == 64 and masks[-1].mask().sum() < before
    wanted = x
    for layer in (part for block in model for part in block):
        weight = layer.weight * layer.weight_mask.mask() if hasattr(layer, "weight_mask") else None
        wanted = layer(wanted) if weight is None else F.linear(wanted, weight, layer.bias)
    assert torch.equal(found, wanted)


def test_top_v_of_fake_tensors_needs_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        (kept,) = top_v([torch.empty(4, 4)], 3)
    assert is_fake(kept)
    assert kept.shape == (4, 4)
    assert kept.dtype == torch.bool
