"""Attention and rotations by native kernels against float64, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvpfx.kernels.chain import Chain
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.kernels.step import Part, Place, Step
from tests.kernels import largest

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=MISSING),
    pytest.mark.usefixtures("instructions", "fixed_inference"),
]


def masks(batch: int, heads: int, size: int) -> dict[str, Tensor | None]:
    seen = torch.rand(batch, 1, 1, size) < 0.8
    seen[..., 0] = True
    rows = torch.rand(batch, 1, size, size) < 0.7
    rows[..., 0] = True
    return {
        "none": None,
        "padding": seen,
        "of each query": rows,
        "added": torch.randn(batch, heads, size, size),
        "large negative numbers": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize(
    "sizes", [(1, 128, 12, 12, 64), (2, 77, 4, 2, 16), (3, 16, 2, 1, 10), (1, 200, 3, 3, 32)],
    ids=str,
)  # fmt: skip
def test_attention(sizes: tuple[int, int, int, int, int]) -> None:
    batch, size, heads, groups, width = sizes
    x = [torch.randn(batch, size, n * width) for n in (heads, groups, groups)]
    split = [t.double().view(batch, size, -1, width).transpose(1, 2) for t in x]
    for name, mask in masks(batch, heads, size).items():
        for causal in (False, True) if mask is None else (False,):
            found = attended(x, heads, groups, mask, causal)
            added = mask if mask is None or mask.dtype is torch.bool else mask.double()
            wanted = F.scaled_dot_product_attention(
                *split, attn_mask=added, is_causal=causal, enable_gqa=True
            )
            wanted = wanted.transpose(1, 2).reshape(batch, size, heads * width)
            assert largest(found, wanted) <= 2e-5, name


@pytest.mark.parametrize(
    "sizes", [(1, 128, 4, 4, 64), (2, 77, 4, 2, 16), (3, 15, 2, 1, 10), (1, 65, 3, 3, 7)], ids=str
)
def test_attention_in_bfloat16(sizes: tuple[int, int, int, int, int]) -> None:
    batch, size, heads, groups, width = sizes
    x = [torch.randn(batch, size, n * width).bfloat16() for n in (heads, groups, groups)]
    split = [t.double().view(batch, size, -1, width).transpose(1, 2) for t in x]
    for name, mask in masks(batch, heads, size).items():
        for causal in (False, True) if mask is None else (False,):
            found = attended(x, heads, groups, mask, causal)
            assert found.dtype is torch.bfloat16
            added = mask if mask is None or mask.dtype is torch.bool else mask.double()
            wanted = F.scaled_dot_product_attention(
                *split, attn_mask=added, is_causal=causal, enable_gqa=True
            )
            wanted = wanted.transpose(1, 2).reshape(batch, size, heads * width)
            assert largest(found, wanted) <= 1.5e-2, name


def attended(x: list[Tensor], heads: int, groups: int, mask: Tensor | None, causal: bool) -> Tensor:
    widths = [t.shape[-1] for t in x]
    width = widths[0] // heads
    out = heads * widths[2] // groups
    entering = [Step("enter", None, Part(i, 0, w), (i,)) for i, w in enumerate(widths)]
    parts = [Part(i, 0, w) for i, w in enumerate(widths)]
    attention = Step(
        "attend",
        parts[0],
        Part(3, 0, out),
        (-1 if mask is None else 3,),
        factor=parts[1],
        addend=parts[2],
        heads=heads,
        groups=groups,
        scale=width**-0.5,
        causal=causal,
    )
    places = [Place(w, slot=i) for i, w in enumerate((*widths, out))]
    steps = (*entering, attention, Step("leave", Part(3, 0, out), None))
    return Chain(steps, places, ())(*x, mask)[0]


@pytest.mark.parametrize("sizes", [(1, 5, 2, 4), (3, 70, 3, 10), (2, 128, 1, 64)], ids=str)
@pytest.mark.parametrize("tables", [1, None])
def test_rotations(sizes: tuple[int, int, int, int], tables: int | None) -> None:
    """By tables of each sequence, or of one for all."""
    batch, size, heads, width = sizes
    x = torch.randn(batch, size, heads * width)
    cosine, sine = torch.randn(2, tables or batch, size, width)
    split = x.double().view(batch, size, heads, width)
    first, second = split.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    wanted = split * cosine.double().unsqueeze(2) + swapped * sine.double().unsqueeze(2)
    parts = [Part(0, 0, heads * width), Part(1, 0, width), Part(2, 0, width)]
    places = [Place(part.width, slot=i) for i, part in enumerate((*parts, parts[0]))]
    out = Part(3, 0, heads * width)
    steps = (
        Step("enter", None, parts[1], (1,), beside=True),
        Step("enter", None, parts[2], (2,), beside=True),
        Step("enter", None, parts[0], (0,)),
        Step("rotate", parts[0], out, factor=parts[1], addend=parts[2], heads=heads),
        Step("leave", out, None),
    )
    found = Chain(steps, places, ())(x, cosine, sine)[0]
    assert largest(found, wanted.flatten(2)) <= 2e-6


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    x = [torch.randn(1, 16, 8) for _ in range(3)]
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    assert torch.equal(attended(x, 2, 2, mask, False), torch.zeros(1, 16, 8))
