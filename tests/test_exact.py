"""Models of the zoo with random structured zeros: converting them changes no output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from tests.dead_units import unexplained
from tests.test_coverage import FAST
from tests.zoo import ZOO
from tests.zoo.entry import output

DENSITIES = (0.75, 0.5, 0.25, 0.1)
CASES = [
    pytest.param(
        name,
        density,
        marks=() if name in FAST and density == 0.25 else pytest.mark.slow,
        id=f"{name}-{density}",
    )
    for name in ZOO
    for density in (DENSITIES if name in FAST else DENSITIES[1:3])
]
"""At a density of 0.25 whole layers are dead as well."""
NO_DOUBLE = ("Mixtral", "Qwen3-MoE", "grouped matmul")
"""Models with kernels that have no float64."""
UNTOUCHED = ("embed", "norm", "original")
"""Parts of the names of weights that feed no matmul, or that a norm of zero would divide."""


def zero_units(model: nn.Module, density: float, whole: bool) -> None:
    """Zero random rows, columns and blocks of all weights; all of some where `whole`."""
    generator = torch.Generator().manual_seed(int(density * 100))

    def gone(count: int) -> Tensor:
        return torch.rand(count, generator=generator) > density

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or any(word in name for word in UNTOUCHED):
                continue
            blocks = 8 if weight.shape[0] % 8 == 0 else 1
            weight[gone(weight.shape[0])] = 0
            weight.view(blocks, weight.shape[0] // blocks, *weight.shape[1:])[gone(blocks)] = 0
            weight[:, gone(weight.shape[1])] = 0
            if whole and float(torch.rand((), generator=generator)) > 0.5:
                weight.zero_()


@pytest.mark.parametrize(("name", "density"), CASES)
def test_zeros_in_any_structure(name: str, density: float) -> None:
    entry = ZOO[name]
    for double in (False,) if name in NO_DOUBLE else (False, True):
        model, batch = entry.model().eval(), entry.batch(0)
        if double:
            model, batch = model.double(), cast_batch(batch, torch.float64)
        tolerance = 1e-10 if double else 1e-5
        zero_units(model, density, whole=density == 0.25)
        with torch.no_grad():
            expected = output(model(**batch))
        small = mvpfx.convert(model, example_inputs=batch, lowering="dense")
        with torch.no_grad():
            found = output(small(**batch))
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(), expected.nan_to_num()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert unexplained(small) == []


def cast_batch(batch: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The batch with its floating tensors in another precision."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
