"""Criteria: first scores, what is ranked, and that a new criterion is one small class."""

import re
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mvpfx import criterion as criteria
from mvpfx.config import PruningConfig, Rule
from mvpfx.criterion import Criterion, Progress, Targets
from mvpfx.granularity import to_matrix
from mvpfx.mask import Mask
from mvpfx.scheduler import SparsityScheduler
from mvpfx.score_init import rank
from mvpfx.site import Site
from tests.toy_masks import Stack, make_mask, raises, values


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes criteria that a test registers out again."""
    known = dict(criteria._CRITERIA)
    yield
    criteria._CRITERIA.clear()
    criteria._CRITERIA.update(known)


def test_unknown_criterion() -> None:
    known = '"movement", "soft_movement", "magnitude"'
    with raises(ValueError, f'criterion "moving" is unknown. Use one of {known}.'):
        criteria.find("moving")
    with raises(TypeError, f"criterion must be a name; found 3. Use one of {known}."):
        criteria.find(3)


@pytest.mark.parametrize("granularity", ["element", (4, 2), "row"])
def test_first_scores_are_the_rank_of_the_magnitude(granularity: object, device: str) -> None:
    mask, weight = make_mask(values(64, 48, device=device), granularity)
    scores = mask.require_scores()
    assert scores.dtype == torch.float32
    assert scores.min() >= 0
    assert scores.max() <= 2
    magnitude = mask.magnitude()
    rows, cols = mask.granularity.block(mask.site)
    expected = mask.granularity.reduce(weight.detach().abs()) / (rows * cols)
    torch.testing.assert_close(magnitude, expected)
    order = magnitude.flatten().argsort()
    assert (scores.flatten()[order].diff() > -1e-6).all()
    exact = order.argsort() / order.numel()
    fullest = (magnitude.flatten().view(torch.int32) >> 16).bincount().max() / order.numel()
    assert (scores.flatten() / 2 - exact).abs().max() < fullest + 1e-6


def test_rank_does_not_touch_the_values_and_ignores_their_sign() -> None:
    weight = values(50, 30)
    before = weight.clone()
    assert torch.equal(rank(weight), rank(weight.abs()))
    assert torch.equal(rank(weight.t()), rank(weight).t())
    assert torch.equal(weight, before)


def test_equal_magnitudes_have_equal_ranks() -> None:
    ranks = rank(torch.tensor([0.0, 1.0, -1.0, 0.0, 2.0]))
    assert ranks[0] == ranks[3] < ranks[1] == ranks[2] < ranks[4]


def test_rank_separates_what_one_bucket_holds() -> None:
    close = 1 + torch.arange(100) * 1e-6
    assert all(one < other for one, other in pairwise(rank(close).tolist()))


def test_rank_of_many_chunks_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = values(10_000)
    whole = rank(weight)
    monkeypatch.setattr("mvpfx.score_init._CHUNK", 777)
    assert torch.equal(rank(weight), whole)


@pytest.mark.parametrize(("score_init", "expected"), [("zero", 0.0), (2.5, 2.5)])
def test_constant_first_scores(score_init: str | float, expected: float) -> None:
    mask, _ = make_mask(values(4, 4), (2, 2), score_init=score_init)
    assert torch.equal(mask.require_scores(), torch.full((2, 2), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32_whatever_the_weight(dtype: torch.dtype) -> None:
    mask, weight = make_mask(values(8, 8).to(dtype))
    assert mask.require_scores().dtype == torch.float32
    assert mask(weight).dtype == dtype


def test_magnitude_stores_nothing() -> None:
    mask, weight = make_mask(values(8, 8), criterion="magnitude", density=0.25)
    assert mask.scores is None
    assert list(mask.state_dict()) == list(mask.parameters()) == []
    mask.density = 0.25
    cut = weight.abs().flatten().sort(descending=True).values[15]
    assert torch.equal(mask.kept(), weight.abs() >= cut)
    with torch.no_grad():
        weight.mul_(-1)[0].fill_(100)
    assert mask.kept()[0].all(), "follows the weight"


def test_soft_movement_passes_a_threshold() -> None:
    mask, _ = make_mask(values(4, 4), criterion="soft_movement", threshold=0.5, score_init="zero")
    assert mask.density is None
    mask.threshold = 0.5
    assert mask.density_now == 0.0, "strictly above"
    with torch.no_grad():
        mask.require_scores()[1] = 1e-3
    assert torch.equal(mask.kept(), torch.arange(4).eq(1)[:, None].expand(4, 4))


class Saliency(Criterion):
    """Running sum of `abs(W * dW)`: accumulated from gradients, not learned."""

    name = "saliency"
    stored = "buffer"

    def initial(self, mask: Mask) -> Tensor:
        return torch.zeros_like(mask.magnitude())

    def importance(self, mask: Mask) -> Tensor:
        return mask.require_scores()

    def apply(self, mask: Mask, weight: Tensor) -> Tensor:
        masked = super().apply(mask, weight)

        def accumulate(grad: Tensor) -> None:
            moved = to_matrix((grad * weight).detach().abs(), mask.site.out_dim)
            mask.require_scores().add_(mask.granularity.reduce(moved))

        if masked.requires_grad:
            masked.register_hook(accumulate)
        return masked


class EmaMagnitude(Criterion):
    """Moving average of `abs(W)` over optimizer steps."""

    name = "ema_magnitude"
    stored = "buffer"

    def initial(self, mask: Mask) -> Tensor:
        return mask.magnitude()

    def importance(self, mask: Mask) -> Tensor:
        return mask.require_scores()

    def advance(self, mask: Mask) -> None:
        mask.require_scores().lerp_(mask.magnitude(), 0.1)


class HardConcrete(Criterion):
    """`l0`: a sampled, non-binary mask with an exact gradient and a penalty."""

    name = "l0"
    stored = "parameter"
    pooled = False
    penalised = True

    def targets(self, rule: Rule, progress: Progress) -> Targets:
        return Targets(penalty_lambda=progress(0.0, rule.penalty_lambda))

    def gate(self, mask: Mask) -> Tensor:
        scores = mask.require_scores()
        if mask.training:
            noise = torch.rand_like(scores).clamp(1e-4, 1 - 1e-4).logit()
            scores = (scores + noise) * 1.5
        return (scores.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def importance(self, mask: Mask) -> Tensor:
        return mask.require_scores().detach()

    def kept(self, mask: Mask) -> Tensor:
        return self.gate(mask) > 0

    def apply(self, mask: Mask, weight: Tensor) -> Tensor:
        return weight * mask.granularity.expand(self.gate(mask), *weight.shape)

    def penalty(self, mask: Mask) -> Tensor:
        return torch.sigmoid(mask.require_scores() + 1.6).mean()


@pytest.mark.parametrize(
    "criterion", [Saliency(), EmaMagnitude(), HardConcrete()], ids=lambda c: c.name
)
def test_a_new_criterion_is_one_class(criterion: Criterion, registry: None) -> None:
    criteria.register(criterion)
    assert PruningConfig(criterion=criterion.name).criterion == criterion.name
    stack = Stack(values(4, 6), values(4, 4), criterion=criterion.name, density=0.5)
    before = [mask.require_scores().detach().clone() for mask in stack.mask_list]
    learned = {name for name, _ in stack.named_parameters() if name.endswith("scores")}
    assert bool(learned) == (criterion.stored == "parameter")
    assert sum(name.endswith("scores") for name in stack.state_dict()) == 2
    scheduler = SparsityScheduler(stack, 2)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for _ in range(2):
        stack(values(5, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    for mask, first in zip(stack.mask_list, before, strict=True):
        assert not torch.equal(mask.require_scores(), first)
        if mask.density is not None:
            assert mask.density_now == 0.5


def test_no_criterion_is_asked_for_by_name_elsewhere() -> None:
    from pathlib import Path

    package = Path(criteria.__file__).parent
    nouns = ["mask", "ranking", "scheduler", "penalty", "optim", "straight_through", "score_init"]
    for noun in nouns:
        text = (package / f"{noun}.py").read_text()
        found = [name for name in criteria.names() if re.search(rf"[\"']{name}[\"']", text)]
        assert found == (["magnitude"] if noun == "score_init" else [])


@pytest.mark.slow
def test_first_scores_of_bert_base_take_under_two_seconds() -> None:
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(12) for shape in shapes]
    seconds: list[float] = []
    for _ in range(2):
        start = time.process_time()
        for i, weight in enumerate(weights):
            Mask(Site(f"{i}.weight", tuple(weight.shape)), weight, Rule())
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
