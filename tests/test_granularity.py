"""Granularity: units tile a weight of any layout, and messages say where they do not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvpfx.granularity import Granularity, from_matrix, matrix_shape, parse, to_matrix
from mvpfx.site import Site
from tests.toy_masks import raises, values


def test_names_and_blocks_are_read() -> None:
    assert parse("2:4") == Granularity(group=(2, 4)) and parse("2:4").is_element
    assert parse("element") == Granularity(1, 1)
    assert parse("row") == Granularity(1, None)
    assert parse("column") == Granularity(None, 1)
    assert parse((32, 8)) == parse([32, 8]) == parse(Granularity(32, 8)) == Granularity(32, 8)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "diagonal",
            ValueError,
            'granularity "diagonal" is unknown. Use "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M" with '
            'N below M, such as "2:4", or the (rows, cols) of a block, such as (32, 32).',
        ),
        (
            "4:4",
            ValueError,
            'granularity "4:4" is unknown. Use "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M" with '
            'N below M, such as "2:4", or the (rows, cols) of a block, such as (32, 32).',
        ),
        (
            (32, 0),
            ValueError,
            "a block needs at least 1 row and 1 column; found (32, 0).",
        ),
        (
            (32,),
            TypeError,
            'granularity must be "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M", or the (rows, cols) of '
            "a block as two whole numbers; found (32,).",
        ),
        (
            (True, 4),
            TypeError,
            'granularity must be "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M", or the (rows, cols) of '
            "a block as two whole numbers; found (True, 4).",
        ),
        (
            (4.0, 4),
            TypeError,
            'granularity must be "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M", or the (rows, cols) of '
            "a block as two whole numbers; found (4.0, 4).",
        ),
        (
            7,
            TypeError,
            'granularity must be "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M", or the (rows, cols) of '
            "a block as two whole numbers; found 7.",
        ),
    ],
)
def test_bad_values(value: object, error: type[Exception], message: str) -> None:
    with raises(error, message):
        parse(value)


def test_a_block_that_does_not_tile_in_width() -> None:
    site = Site("encoder.0.ffn.weight", (3072, 770))
    message = (
        "encoder.0.ffn.weight is 3072 x 770, which 32 x 32 blocks do not tile "
        "(770 = 24 * 32 + 2).\n"
        "Use a block width that divides 770, or leave the site out: "
        'overrides={"encoder.0.ffn": None}'
    )
    with raises(ValueError, message):
        parse((32, 32)).check(site)


def test_a_block_that_does_not_tile_in_both_on_a_transposed_weight() -> None:
    site = Site("h.0.c_fc.weight", (6, 10), out_dim=1)
    message = (
        "h.0.c_fc.weight is 10 x 6 as outputs x inputs, which 4 x 4 blocks do not tile "
        "(10 = 2 * 4 + 2, 6 = 1 * 4 + 2).\n"
        "Use a block height that divides 10 and a block width that divides 6, "
        'or leave the site out: overrides={"h.0.c_fc": None}'
    )
    with raises(ValueError, message):
        parse((4, 4)).check(site)


def test_groups_that_do_not_tile_the_inputs() -> None:
    message = (
        "h.0.c_fc.weight has 6 inputs, which groups of 4 do not tile (6 = 1 * 4 + 2).\n"
        "Use groups whose size divides 6, or leave the site out: "
        'overrides={"h.0.c_fc": None}'
    )
    with raises(ValueError, message):
        parse("2:4").check(Site("h.0.c_fc.weight", (6, 8), out_dim=1))
    parse("2:4").check(Site("h.0.c_fc.weight", (6, 8)))


@pytest.mark.parametrize("text", ["1:2", "2:4", "3:8"])
def test_the_top_of_each_group_is_protected(text: str) -> None:
    keep, size = (int(number) for number in text.split(":"))
    importance = torch.randint(0, 3, (5, 16), generator=torch.Generator().manual_seed(0)).float()
    protected = parse(text).protect(importance).isinf()
    for row, found in zip(importance.view(-1, size), protected.view(-1, size), strict=True):
        wanted = sorted(range(size), key=lambda i: (-float(row[i]), i))[:keep]
        assert sorted(wanted) == found.nonzero().flatten().tolist()


def test_a_block_larger_than_the_weight_of_the_root() -> None:
    message = (
        "weight is 4 x 4, which 8 x 4 blocks do not tile (4 = 0 * 8 + 4).\n"
        'Use a block height that divides 4, or leave the site out: overrides={"weight": None}'
    )
    with raises(ValueError, message):
        parse((8, 4)).check(Site("weight", (4, 4)))


@pytest.mark.parametrize(
    ("granularity", "units"),
    [("element", (6, 8)), ("row", (6, 1)), ("column", (1, 8)), ((3, 4), (2, 2)), ((6, 8), (1, 1))],
)
def test_units_shape(granularity: object, units: tuple[int, int]) -> None:
    site = Site("w", (6, 8))
    parsed = parse(granularity)
    parsed.check(site)
    assert parsed.units_shape(site) == units
    assert parsed.reduce(values(6, 8)).shape == units
    assert parsed.expand(values(*units), 6, 8).shape == (6, 8)


@pytest.mark.parametrize(
    ("shape", "out_dim", "matrix"),
    [
        ((6, 8), 0, (6, 8)),
        ((6, 8), 1, (8, 6)),
        ((6, 4, 3, 3), 0, (6, 36)),
        ((4, 6, 3), 1, (6, 12)),
        ((2, 3, 5), 2, (5, 6)),
        ((7,), 0, (7, 1)),
    ],
)
def test_the_matrix_view_and_back(
    shape: tuple[int, ...], out_dim: int, matrix: tuple[int, int], device: str
) -> None:
    weight = values(*shape, device=device)
    view = to_matrix(weight, out_dim)
    assert view.shape == matrix == matrix_shape(Site("w", shape, out_dim))
    assert torch.equal(from_matrix(view, shape, out_dim), weight)
    first_output = weight.select(out_dim, 0).flatten()
    assert torch.equal(view[0], first_output)


def test_elements_are_not_copied() -> None:
    weight = values(6, 8)
    element = parse("element")
    assert element.reduce(weight) is weight
    assert element.expand(weight, 6, 8) is weight
    assert to_matrix(weight, 1).data_ptr() == weight.data_ptr()


@given(
    blocks=st.tuples(*[st.integers(1, 4)] * 2),
    units=st.tuples(*[st.integers(1, 5)] * 2),
    seed=st.integers(0, 1000),
)
def test_expand_and_reduce_round_trip(
    blocks: tuple[int, int], units: tuple[int, int], seed: int
) -> None:
    granularity = parse(blocks)
    height, width = units[0] * blocks[0], units[1] * blocks[1]
    score = values(*units, seed=seed)
    whole = granularity.expand(score, height, width)
    assert whole.shape == (height, width)
    torch.testing.assert_close(granularity.reduce(whole), score * math.prod(blocks))
    for r in range(height):
        for c in range(width):
            assert whole[r, c] == score[r // blocks[0], c // blocks[1]]
