"""Granularity: the shape of the unit that one score governs.

Everything here works on the matrix view of a weight, `[outputs, inputs]`, whatever the layout of
the parameter: a convolution's kernel is flattened, a weight stored `[in, out]` is transposed, the
matrices of stacked experts come one below the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvpfx.site import Site

NAMED: dict[str, tuple[int | None, int | None]] = {
    "element": (1, 1),
    "row": (1, None),
    "column": (None, 1),
}
HYBRID_BLOCK = 32
"""Rows and columns of the blocks of "hybrid", as in the authors' runs."""
_GROUP = re.compile("([0-9]+):([0-9]+)")


@dataclass(frozen=True)
class Granularity:
    """A unit of `rows` outputs by `cols` inputs; None stands for the whole dimension.

    With `group` (N, M) the units are single weights, of which N stay in each M that are neighbours
    along the inputs: the axis that sparse tensor cores group along. With `head` a unit is what one
    attention head has of a projection, with `channel` what one hidden channel has of a weight: its
    sizes are known where the site is, see `of`. Until then the sizes with `channel` are those of
    blocks for sites without hidden channels, and None where there are to be no such blocks.

    >>> (block := parse((2, 3))).rows, block.cols
    (2, 3)
    >>> (row := parse("row")).rows, row.cols
    (1, None)
    >>> parse("2:4").group, parse("head").head, parse("hybrid").channel
    ((2, 4), True, True)

    Attributes:
        rows, cols: of a unit; None for the whole dimension.
        group: (N, M), or None.
        head: whether a unit belongs to a head.
        channel: whether a unit belongs to a hidden channel.
        copies: at how many places along the outputs a unit has `rows`, evenly spread.
        places: how many places the kernel of a convolution has: groups and blocks are of input
            channels at one place, which stand so many columns apart. 1 for all other weights.
    """

    rows: int | None = 1
    cols: int | None = 1
    group: tuple[int, int] | None = None
    head: bool = False
    channel: bool = False
    copies: int = 1
    places: int = 1

    def __str__(self) -> str:
        """As in a configuration: a name, or the sizes of a block.

        >>> print(parse("element"), parse("row"), parse((32, 8)), parse("2:4"))
        element row 32 x 8 2:4
        """
        if self.head or self.channel:
            return "head" if self.head else "channel"
        if self.group is not None:
            return "{}:{}".format(*self.group)
        names = {sizes: name for name, sizes in NAMED.items()}
        sizes = (self.rows, self.cols)
        return names.get(sizes) or " x ".join("all" if n is None else str(n) for n in sizes)

    def of(self, site: Site) -> Granularity:
        """The same with the sizes that heads or channels have at `site`; of "hybrid" what fits it.

        Raises:
            ValueError: if it is no projection of an attention, or has no hidden channels.
        """
        if self.channel and site.channel is not None:
            unit = site.channel
            return Granularity(unit.rows, unit.cols, channel=True, copies=unit.copies)
        if self.channel:
            return self._block_of(site)
        if not self.head:
            return replace(self, places=self._places(site))
        if site.head is None:
            raise ValueError(
                f"{site.name} is no projection of an attention whose number of heads is known, so "
                f'it has no heads. Use another granularity there, such as "row", or leave the '
                f'site out: overrides={{"{site.module_name or site.name}": None}}'
            )
        return Granularity(site.head.rows, site.head.cols, head=True)

    def fits(self, site: Site) -> bool:
        """Whether `site` has heads or hidden channels, where these are asked for."""
        if self.head:
            return site.head is not None
        return not self.channel or site.channel is not None or self.rows is not None

    def _block_of(self, site: Site) -> Granularity:
        """The blocks of a site without hidden channels: as they are, or the largest powers of two
        below that tile it, and each of its heads.

        Raises:
            ValueError: if there are to be none.
        """
        if self.rows is None or self.cols is None:
            raise ValueError(
                f"{site.name} has no hidden channels: no graph shows another weight whose rows go "
                "with its columns, or the other way round. Use another granularity there, such as "
                f'"row", or leave the site out: overrides={{"{site.module_name or site.name}": '
                "None}"
            )
        height, width = matrix_shape(site)
        places = self._places(site)
        head_rows, head_cols = (site.head.rows, site.head.cols) if site.head else (None, None)
        rows = math.gcd(self.rows, head_rows or height // site.parts)
        return Granularity(rows, math.gcd(self.cols, head_cols or width // places), places=places)

    def _places(self, site: Site) -> int:
        """Places of the kernel that `site` has, where units are of several input channels."""
        several = self.group is not None or (self.cols is not None and self.cols > 1)
        return kernel_places(site) if several else 1

    @property
    def is_element(self) -> bool:
        """Whether each weight has a score of its own."""
        return self.rows == 1 and self.cols == 1 and self.copies == 1

    @property
    def density(self) -> float | None:
        """The fraction that `group` keeps; None where there is none.

        >>> parse("2:4").density, parse("element").density
        (0.5, None)
        """
        return None if self.group is None else self.group[0] / self.group[1]

    def protect(self, importance: Tensor) -> Tensor:
        """Where `group` is set, the top N of each M made infinite, so that they stay longest.

        Of equal ones those of lower index are protected.

        >>> parse("1:2").protect(torch.tensor([[3.0, 2.0, 1.0, 1.0]]))
        tensor([[inf, 2., inf, 1.]])
        """
        if self.group is None:
            return importance
        keep, size = self.group
        groups = importance.unflatten(1, (-1, size, self.places))
        order = groups.argsort(dim=2, descending=True, stable=True)
        return groups.scatter(2, order[:, :, :keep], math.inf).flatten(1)

    def block(self, site: Site) -> tuple[int, int]:
        """Size of one unit of `site`, as (outputs, inputs)."""
        height, width = matrix_shape(site)
        return (self.rows or height // site.parts) * self.copies, self.cols or width

    def units_shape(self, site: Site) -> tuple[int, int]:
        """Number of units of `site` along (outputs, inputs)."""
        (height, width), (rows, cols) = matrix_shape(site), self.block(site)
        return height // rows, width // cols

    def check(self, site: Site) -> None:
        """Make sure that the units tile the weight of `site`.

        Raises:
            ValueError: if they do not; the message says what to do.
        """
        (height, width), (rows, cols) = matrix_shape(site), self.block(site)
        height //= site.parts
        if self.group is not None:
            self._check_groups(site, self.group[1], width // self.places)
            return
        width //= self.places
        sizes = [("height", height, rows), ("width", width, cols)]
        bad = [(word, size, part) for word, size, part in sizes if size % part or not size]
        if not bad:
            return
        view = "" if site.shape == (height, width) else " as outputs x inputs"
        view += " at one place of its kernel" * (self.places > 1)
        sums = ", ".join(
            f"{size} = {size // part} * {part} + {size % part}" for _, size, part in bad
        )
        repair = " and ".join(f"a block {word} that divides {size}" for word, size, _ in bad)
        raise ValueError(
            f"{site.name} is {height} x {width}{view}, which {rows} x {cols} blocks do not tile "
            f"({sums}).\nUse {repair}, or leave the site out: "
            f'overrides={{"{site.module_name or site.name}": None}}'
        )

    def _check_groups(self, site: Site, size: int, width: int) -> None:
        word = "inputs" if self.places == 1 else "input channels at each place of its kernel"
        if width % size or not width:
            raise ValueError(
                f"{site.name} has {width} {word}, which groups of {size} do not tile "
                f"({width} = {width // size} * {size} + {width % size}).\n"
                f"Use groups whose size divides {width}, or leave the site out: "
                f'overrides={{"{site.module_name or site.name}": None}}'
            )

    def reduce(self, matrix: Tensor, parts: int = 1) -> Tensor:
        """Sum over each unit: `[outputs, inputs]` -> `[r, c]`, of as many `parts` as the site has.

        Not a copy where a unit is one element.
        """
        if self.is_element:
            return matrix
        rows, cols = self.rows or matrix.shape[0] // parts, self.cols or matrix.shape[1]
        lines = matrix.unflatten(0, (self.copies, -1, rows)).sum((0, 2))
        return lines if cols == 1 else lines.unflatten(1, (-1, cols, self.places)).sum(2).flatten(1)

    def expand(self, units: Tensor, height: int, width: int) -> Tensor:
        """Repeat each unit's value over its weights: `[r, c]` -> `[height, width]`.

        Not a copy where a unit is one element.
        """
        if self.is_element:
            return units
        (r, c), copies = units.shape, self.copies
        columns = units.view(r, -1, 1, self.places)
        lines = columns.expand(-1, -1, width // c, -1).reshape(r, width)
        rows = height // (copies * r)
        return lines[None, :, None].expand(copies, r, rows, width).reshape(height, width)

    def side_by_side(self, matrix: Tensor) -> Tensor:
        """The matrix with the columns of each unit next to one another."""
        if self.places == 1 or self.is_element:
            return matrix
        cols = self.cols or 1
        return matrix.unflatten(1, (-1, cols, self.places)).transpose(2, 3).flatten(1)

    def as_before(self, matrix: Tensor) -> Tensor:
        """The inverse of `side_by_side`."""
        if self.places == 1 or self.is_element:
            return matrix
        cols = self.cols or 1
        return matrix.unflatten(1, (-1, self.places, cols)).transpose(2, 3).flatten(1)


PRESETS = {
    "head": Granularity(None, None, head=True),
    "channel": Granularity(None, None, channel=True),
    "hybrid": Granularity(HYBRID_BLOCK, HYBRID_BLOCK, channel=True),
}
"""Names whose sizes depend on the site."""


def parse(value: object) -> Granularity:
    """Read the user's word for a granularity: a name, or (rows, cols) of a block.

    Raises:
        TypeError: if `value` is neither a name nor two whole numbers.
        ValueError: if the name is unknown or a size is below 1.
    """
    if isinstance(value, Granularity):
        return value
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    names = ", ".join(f'"{name}"' for name in (*NAMED, *PRESETS))
    if isinstance(value, str):
        match = _GROUP.fullmatch(value)
        if match and 0 < int(match[1]) < int(match[2]):
            return Granularity(group=(int(match[1]), int(match[2])))
        if value not in NAMED:
            raise ValueError(
                f'granularity "{value}" is unknown. Use {names}, "N:M" with N below M, such as '
                '"2:4", or the (rows, cols) of a block, such as (32, 32).'
            )
        return Granularity(*NAMED[value])
    sizes: list[object] = list(value) if isinstance(value, Sequence) else []
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    if len(sizes) != 2 or len(whole) != 2:
        raise TypeError(
            f'granularity must be {names}, "N:M", or the (rows, cols) of a block as two whole '
            f"numbers; found {value!r}."
        )
    if min(whole) < 1:
        raise ValueError(f"a block needs at least 1 row and 1 column; found {value!r}.")
    return Granularity(whole[0], whole[1])


def matrix_shape(site: Site) -> tuple[int, int]:
    """(outputs, inputs) of the weight of `site`; inputs are all dimensions but the outputs', and
    stacked matrices lie one below the other.
    """
    outputs = site.shape[site.out_dim] * site.parts
    return outputs, math.prod(site.shape) // outputs if outputs else 0


def kernel_places(site: Site) -> int:
    """How many places the kernel of a convolution has; 1 for any other weight.

    >>> kernel_places(Site("conv.weight", (8, 4, 3, 3))), kernel_places(Site("w", (8, 4)))
    (9, 1)
    """
    convolution = site.parts == 1 and len(site.shape) > 2
    stack_of_one = len(site.shape) == 3 and site.shape[0] == 1 and site.out_dim > 0
    return math.prod(site.shape[2:]) if convolution and not stack_of_one else 1


def to_matrix(weight: Tensor, out_dim: int, parts: int = 1) -> Tensor:
    """View a weight of any rank as `[outputs, inputs]`; copies only above rank 2.

    Where the first dimension stacks `parts` matrices, they come one below the other.
    """
    if parts > 1:
        return weight.movedim(out_dim, 1).reshape(parts * weight.shape[out_dim], -1)
    if weight.dim() == 2:
        return weight if out_dim == 0 else weight.t()
    return weight.movedim(out_dim, 0).reshape(weight.shape[out_dim], -1)


def from_matrix(matrix: Tensor, shape: Sequence[int], out_dim: int, parts: int = 1) -> Tensor:
    """The way back of `to_matrix`: `[outputs, inputs]` -> `shape`, as a view where possible."""
    if len(shape) == 2:
        return matrix if out_dim == 0 else matrix.t()
    rest = [size for dim, size in enumerate(shape) if dim != out_dim]
    if parts > 1:
        return matrix.reshape(torch.Size([parts, shape[out_dim], *rest[1:]])).movedim(1, out_dim)
    return matrix.reshape(torch.Size([matrix.shape[0], *rest])).movedim(0, out_dim)
