"""The masked weight and its gradients: exact where they are derivatives, straight-through else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx.granularity import from_matrix, parse
from mvpfx.straight_through import apply_mask, both_gradients
from mvpfx.training_kernels import library
from mvpfx.weight_layout import Layout
from tests.toy_masks import values

SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((6, 8), 0, 1),
    ((8, 6), 1, 1),
    ((6, 4, 1, 2), 0, 1),
    ((2, 6, 8), 1, 2),
]
UNITS: list[object] = ["element", (3, 2), (2, 4), "row", "column"]


def layout(units: object, out_dim: int = 0, parts: int = 1) -> Layout:
    return Layout(parse(units), out_dim, parts)


def test_the_weights_gradient_is_exact() -> None:
    weight = values(6, 8).double().requires_grad_()
    mask = values(6, 8, seed=1) > 0

    def masked(weight: Tensor) -> Tensor:
        out = apply_mask(weight, None, mask, layout("element"))
        return F.linear(values(3, 8, seed=2).double(), out).tanh()

    assert torch.autograd.gradcheck(masked, (weight,))
    assert torch.autograd.gradgradcheck(masked, (weight,))


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize(("shape", "out_dim", "parts"), SHAPES)
def test_the_scores_gradient_is_that_of_units_of_ones(
    shape: tuple[int, ...], out_dim: int, parts: int, units: object
) -> None:
    """`dS` is the exact derivative of `W * expand(U)` with respect to `U`, in float64."""
    found = layout(units, out_dim, parts)
    weight = values(*shape).double()
    height, width = found.matrix(weight).shape
    down, across = found.units(height, width)[0]

    def plain(ones: Tensor) -> Tensor:
        matrix = found.granularity.expand(ones, height, width)
        return (weight * from_matrix(matrix, shape, out_dim, parts)).sin()

    ones = torch.ones(down, across, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plain, (ones,))
    grad = weight.cos()  # of the sum of sines with respect to what they are taken of
    (wanted,) = torch.autograd.grad(plain(ones).sum(), ones)
    _, movement = both_gradients(grad, weight, None, found)
    torch.testing.assert_close(movement.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize(("shape", "out_dim", "parts"), SHAPES)
def test_both_gradients(
    shape: tuple[int, ...], out_dim: int, parts: int, units: object, way: str
) -> None:
    grad, weight, mask = values(*shape), values(*shape, seed=1), values(*shape, seed=2) > 0
    found = layout(units, out_dim, parts)
    weight_grad, movement = both_gradients(grad, weight, mask, found)
    assert torch.equal(weight_grad, grad * mask)
    products = found.matrix(grad.double() * weight.double())
    wanted = found.granularity.reduce(products, parts)
    torch.testing.assert_close(movement.double(), wanted, rtol=1e-5, atol=1e-6)


def test_single_weights_are_the_same_to_the_bit_without_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grad, weight, mask = values(70, 90), values(70, 90, seed=1), values(70, 90, seed=2) > 0
    grad[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    native = both_gradients(grad, weight, mask, layout("element"))
    monkeypatch.setattr(library, "LIBRARY", None)
    plain = both_gradients(grad, weight, mask, layout("element"))
    for found, wanted in zip(native, plain, strict=True):
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_uses_of_one_masked_weight_add_up(way: str) -> None:
    weight, scores = nn.Parameter(values(5, 5)), nn.Parameter(values(5, 5, seed=1))
    mask, x = values(5, 5, seed=2) > 0, values(3, 5, seed=3)
    masked = apply_mask(weight, scores, mask, layout("element"))
    F.linear(F.linear(x, masked).tanh(), masked).sum().backward()
    leaf = (weight.detach() * mask).requires_grad_()
    F.linear(F.linear(x, leaf).tanh(), leaf).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(weight.grad, leaf.grad * mask)
    torch.testing.assert_close(scores.grad, leaf.grad * weight.detach())


@pytest.mark.parametrize("kept", [True, False], ids=["all kept", "some kept"])
def test_a_whole_gradient(kept: bool, way: str) -> None:
    weight = nn.Parameter(values(5, 5))
    mask = None if kept else values(5, 5, seed=2) > 0
    masked = apply_mask(weight, None, mask, layout("element"), whole=True)
    masked.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * masked.detach())

    def loss(weight: Tensor) -> Tensor:
        return apply_mask(weight, None, mask, layout("element"), whole=True).square().sum()

    functional: Any = torch.func.grad(loss)
    torch.testing.assert_close(functional(weight.detach()), weight.grad)
