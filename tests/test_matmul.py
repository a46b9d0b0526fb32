"""Matmuls in a graph: which dimension of a weight runs along the output, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.passes.capture import Capture
from mvpfx.passes.find_sites import FindSites
from mvpfx.pipeline import run
from mvpfx.program import Program
from tests.zoo import ZOO


def out_dims(name: str) -> dict[str, int]:
    entry = ZOO[name]
    passes = (Capture(entry.batch(0)), FindSites(mvpfx.PruningConfig()))
    program, _ = run(passes, Program(entry.model()))
    return {site.name: site.out_dim for site in program.sites.values()}


def test_products() -> None:
    assert out_dims("matmul, mm, linear") == {
        "operator": 1,
        "function": 1,
        "method": 0,
        "left": 0,
        "turned": 0,
        "linear": 0,
        "sliced": 0,
        "mm": 1,
        "mm_method": 0,
        "listed.0": 1,
        "listed.1": 1,
        "named.a": 1,
        "inner": 0,
        "contracted": 1,
    }


def test_batched_products() -> None:
    found = out_dims("addmm, bmm, einsum")
    assert found == {
        "addmm": 0,
        "addmm_method": 1,
        "bank": 2,
        "added": 2,
        "mixed": 1,
        "heads": 0,
        "implicit": 1,
    }


@pytest.mark.parametrize(
    ("dims", "out_dim"), [(1, 1), (([2], [0]), 1), (([2], [1]), 0), (([-1], [-1]), 0)]
)
def test_tensordot(dims: int | tuple[list[int], list[int]], out_dim: int) -> None:
    class Contracted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensordot(x, self.weight, dims=dims)  # pyright: ignore[reportArgumentType]

    passes = (Capture(torch.randn(2, 3, 8)), FindSites(mvpfx.PruningConfig()))
    program, _ = run(passes, Program(Contracted()))
    assert {name: site.out_dim for name, site in program.sites.items()} == {"weight": out_dim}
