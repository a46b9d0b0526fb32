"""Recomputing: what autograd saves of a masked weight, and that nothing else changes by it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvpfx.granularity import Granularity
from mvpfx.recomputing import Recomputing, Saver, product
from mvpfx.straight_through import apply_mask
from mvpfx.torch_private import StorageWeakRef, saved_tensor_hooks, storage_address
from mvpfx.weight_layout import Layout
from tests.toy_masks import values

ELEMENTS = Layout(Granularity())


class Linear(nn.Module):
    """A masked product whose masked weight can be asked for."""

    def __init__(self, recomputes: bool = True) -> None:
        super().__init__()
        self.weight, self.scores = nn.Parameter(values(6, 4)), nn.Parameter(values(6, 4, seed=1))
        self.mask = values(6, 4, seed=2) > 0
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        if not self.recomputes:
            return self.product(x)
        with Recomputing():
            return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, apply_mask(self.weight, self.scores, self.mask, ELEMENTS))

    def gradients(self, out: Tensor) -> list[Tensor | None]:
        self.weight.grad = self.scores.grad = None
        out.sin().sum().backward()
        return [self.weight.grad, self.scores.grad]


def test_the_gradients_are_those_of_saving() -> None:
    layer, x = Linear(), values(5, 4, seed=3)
    found = layer.gradients(layer(x))
    layer.recomputes = False
    torch.testing.assert_close(found, layer.gradients(layer(x)), rtol=0, atol=0)


def test_the_masked_weight_does_not_live_until_the_backward_pass() -> None:
    kept: list[Any] = []
    for recomputes in (True, False):
        layer = Linear(recomputes)
        masked: list[Any] = []

        def watched(x: Tensor, layer: Linear = layer, masked: list[Any] = masked) -> Tensor:
            made = apply_mask(layer.weight, layer.scores, layer.mask, ELEMENTS)
            masked.append(StorageWeakRef(made.untyped_storage()))
            return F.linear(x, made)

        layer.product = watched
        out = layer(values(5, 4).requires_grad_())
        kept.append(not masked[0].expired())
        layer.gradients(out)
    assert kept == [False, True]


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "in three dimensions"])
def test_views_of_a_masked_weight(view: str) -> None:
    def compute(layer: Linear, x: Tensor) -> Tensor:
        masked = apply_mask(layer.weight, layer.scores, layer.mask, ELEMENTS)
        parts: dict[str, Tensor] = {
            "rows": masked[2:5].t(),
            "columns": masked[:, 1:].t()[[0, 1, 2]].contiguous(),
            "transposed": masked.t(),
            "in three dimensions": masked.view(2, 3, 4).transpose(1, 2)[1],
        }
        return x[:, : len(parts[view])] @ parts[view]

    found: list[list[Tensor | None]] = []
    for recomputes in (True, False):
        layer = Linear(recomputes)
        layer.product = lambda x, layer=layer: compute(layer, x)
        found.append(layer.gradients(layer(values(5, 4))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_masked_weight_that_was_written_to_is_saved_as_it_is() -> None:
    found: list[list[Tensor | None]] = []
    for recomputes in (True, False):
        layer = Linear(recomputes)

        def scaled(x: Tensor, layer: Linear = layer) -> Tensor:
            masked = apply_mask(layer.weight, layer.scores, layer.mask, ELEMENTS).mul_(3.0)
            return F.linear(F.linear(x, masked), masked.t())

        layer.product = scaled
        found.append(layer.gradients(layer(values(5, 4))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_weight_that_is_written_to_before_the_backward_pass() -> None:
    layer, x = Linear(), values(5, 4).requires_grad_()
    out = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    start = (
        "one of the variables needed for gradient computation has been modified by an inplace "
        "operation: [torch.FloatTensor [6, 4]] is at version 1; expected version 0 instead."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(start)}"):
        out.sum().backward()


def test_an_activation_that_is_written_to_before_the_backward_pass() -> None:
    layer, x = Linear(), values(5, 4)
    layer.product = lambda x: F.linear(x.exp(), layer.weight)  # pyright: ignore[reportAttributeAccessIssue]
    out = layer(x)
    assert isinstance(out, Tensor)
    with Recomputing():
        hidden = layer.weight.exp()
        out = hidden * 2
        with torch.no_grad():
            hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_and_outside(reentrant: bool) -> None:
    x = values(5, 4).requires_grad_()
    layer = Linear()
    wanted = layer.gradients(layer(x))
    outside = layer.gradients(checkpoint(layer, x, use_reentrant=reentrant))
    layer.recomputes = False
    with Recomputing():
        inside = layer.gradients(checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close([outside, inside], [wanted, wanted], rtol=0, atol=0)


def test_checkpoints_around_it_still_throw_activations_away() -> None:
    layer = Linear()
    made: list[Tensor] = []

    def wide(x: Tensor) -> Tensor:
        hidden = layer.product(x).exp()
        made.append(hidden.detach())
        return hidden.sin()

    def region(x: Tensor) -> Tensor:
        with Recomputing():
            return wide(x)

    out = checkpoint(region, values(5, 4).requires_grad_(), use_reentrant=False)
    assert len(made) == 1
    out.sum().backward()
    assert len(made) == 2, "computed again"


def test_what_somebody_else_packs_is_left_to_them() -> None:
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(storage_address(tensor))
        return tensor.clone()

    layer, x = Linear(), values(5, 4).requires_grad_()
    wanted = layer.gradients(layer(x))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert storage_address(x) in packed
    torch.testing.assert_close(layer.gradients(out), wanted, rtol=0, atol=0)


def test_nothing_is_hooked_without_gradients_or_twice() -> None:
    with torch.no_grad(), Recomputing():
        assert saved_tensor_hooks() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), Recomputing():
        pass
    with Recomputing():
        hooks = saved_tensor_hooks()
        assert hooks is not None
        with Recomputing():
            assert saved_tensor_hooks() == hooks
    assert saved_tensor_hooks() is None


def test_gradients_of_gradients() -> None:
    x = values(5, 4)
    found: list[Tensor] = []
    for recomputes in (True, False):
        layer = Linear(recomputes)
        first = torch.autograd.grad(layer(x).sin().sum(), layer.weight, create_graph=True)[0]
        found += torch.autograd.grad(first.square().sum(), layer.weight)
    torch.testing.assert_close(found[0], found[1])


def test_a_storage_that_came_later_is_not_taken_for_a_masked_weight() -> None:
    saver = Saver(None)
    weight = values(6, 4)
    mask = weight > 0
    with Recomputing():
        hooks = saved_tensor_hooks()
        assert hooks is not None
        saver = hooks[0].__self__  # pyright: ignore[reportFunctionMemberAccess]
        apply_mask(nn.Parameter(weight), None, mask, ELEMENTS)
        assert len(saver.made) == 1, "it is known, and gone"
        for other in [torch.zeros(6, 4) for _ in range(100)]:
            assert saver.unpack(saver.pack(other)) is other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products(dtype: torch.dtype) -> None:
    weight = values(37, 19).to(dtype).requires_grad_()
    mask = values(37, 19, seed=1) > 0
    found = product(weight, mask)
    assert not found.requires_grad
    assert torch.equal(found, weight.detach() * mask)
