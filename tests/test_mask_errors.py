"""Mask: weights it refuses, NaN it never hides, and compilers it lives with."""

import pytest
import torch
from torch import Tensor, nn

from mvpfx.mask import Mask
from mvpfx.site import Site
from tests.toy_masks import make_mask, raises, rule, values

SITE = Site("encoder.0.ffn.weight", (4, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    message = (
        f"encoder.0.ffn.weight holds {name} values, and a mask needs one of float16, bfloat16, "
        "float32, float64. Prune before quantising, or leave the site out: "
        'overrides={"encoder.0.ffn": None}'
    )
    with raises(TypeError, message):
        Mask(SITE, weight, rule())


def test_weights_without_values() -> None:
    message = (
        "encoder.0.ffn.weight is on the meta device and has no values to prune. "
        "Load the model's weights first, then call prepare."
    )
    with raises(ValueError, message):
        Mask(SITE, nn.Parameter(torch.zeros(4, 4, device="meta")), rule())


def test_weights_that_are_nan() -> None:
    weight = torch.zeros(4, 4)
    weight[0, :2] = float("nan")
    message = (
        "encoder.0.ffn.weight has 2 NaN among its 16 weights. Load sound weights before calling "
        'prepare, or leave the site out: overrides={"encoder.0.ffn": None}'
    )
    with raises(ValueError, message):
        Mask(SITE, nn.Parameter(weight), rule())


def test_blocks_that_do_not_tile() -> None:
    message = (
        "encoder.0.ffn.weight is 4 x 4, which 3 x 4 blocks do not tile (4 = 1 * 3 + 1).\n"
        "Use a block height that divides 4, or leave the site out: "
        'overrides={"encoder.0.ffn": None}'
    )
    with raises(ValueError, message):
        Mask(SITE, nn.Parameter(torch.zeros(4, 4)), rule((3, 4)))


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", ["movement", "soft_movement"])
def test_scores_that_become_nan(criterion: str, scope: str, density: float, device: str) -> None:
    mask, weight = make_mask(values(4, 4, device=device), criterion=criterion, scope=scope)
    if mask.density is not None:
        mask.density = density
    mask(weight)
    with torch.no_grad():
        mask.require_scores()[2, 1] = float("nan")
    message = (
        "ffn.weight has 1 NaN among the 16 scores that decide its mask. Training has diverged: "
        "lower lr or score_lr, clip the gradients, or go back to an earlier checkpoint."
    )
    for training in (True, False):
        mask.train(training)
        for _ in range(2):
            with raises(ValueError, message):
                mask(weight)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_weights_that_become_nan(density: float) -> None:
    mask, weight = make_mask(values(4, 4), (2, 2), criterion="magnitude")
    mask.density = density
    mask(weight)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    message = (
        "ffn.weight has 1 NaN among the 4 weights that decide its mask. Training has diverged: "
        "lower lr or score_lr, clip the gradients, or go back to an earlier checkpoint."
    )
    with raises(ValueError, message):
        mask(weight)


def test_infinite_scores_are_no_nan() -> None:
    mask, weight = make_mask(values(4, 4))
    mask.density = 0.5
    with torch.no_grad():
        mask.require_scores()[0] = float("inf")
        mask.require_scores()[1] = -float("inf")
    mask(weight)
    assert mask.kept()[0].all()
    assert not mask.kept()[1].any()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask, self.weight = make_mask(values(4, 4))
        self.mask.density = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mask(self.weight).t()


def test_exported_masks_are_part_of_the_graph() -> None:
    layer, x = Layer(), values(3, 4)
    exported = torch.export.export(layer.eval(), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), layer(x))
