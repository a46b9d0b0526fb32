"""Tiled activations: the layout that native kernels compute in.

Activations `[..., S, F]` are kept as float32 in tiles of 16, 32 or 64 tokens, feature by feature
within a tile, so one weight meets tokens that lie side by side, as many as the instruction set sums
at once. Each sequence is padded to a multiple of 16 tokens; the last tile may be narrower.
`bfloat16` activations are converted at the edges: sums, norms and softmax are those of float32.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.kernels.library import CGeometry, CSlice, tile_tokens

CHUNK = 16
"""Each sequence is padded to a multiple of so many tokens."""


@dataclass(slots=True)
class Tiles:
    """Features `first` to `first + width` of tiled activations.

    Attributes:
        data: float32, at least `features` for each padded token.
        geometry: sequences, tokens of each, and of a tile.
        features: that `data` holds for each token.
        first, width: the part that is meant.
        front: the leading dimensions that the activations have outside, with the tokens.
        dtype: that they have outside.
    """

    data: Tensor
    geometry: CGeometry
    features: int
    first: int
    width: int
    front: tuple[int, ...]
    dtype: torch.dtype

    def part(self, first: int, width: int) -> Tiles:
        """Some neighbouring features."""
        start = self.first + first
        return Tiles(self.data, self.geometry, self.features, start, width, self.front, self.dtype)

    def slice(self) -> CSlice:
        """As the library takes them."""
        stride = self.features * self.geometry.tile
        return CSlice(self.data.data_ptr(), stride, self.first, self.data.numel())


def geometry_of(x: Tensor) -> CGeometry:
    """How many sequences and tokens activations `[..., S, F]` have."""
    front = x.shape[:-1]
    return CGeometry(math.prod(front[:-1]), front[-1] if front else 1, tile_tokens())


def padded_tokens(geometry: CGeometry) -> int:
    """Tokens with those that only fill up a chunk.

    >>> padded_tokens(CGeometry(2, 17, 64))
    64
    """
    return geometry.sequences * ((geometry.tokens + CHUNK - 1) // CHUNK * CHUNK)


class Workspace(threading.local):
    """Memory for activations between two calls of the library, kept from call to call.

    Regions run one after the other in a thread, and what one leaves behind is not read by the next,
    so all of them share the same room.
    """

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}

    def room(self, slot: int, floats: int) -> Tensor:
        """At least so many floats, whose values do not matter."""
        known = self.held.get(slot)
        if known is None or known.numel() < floats:
            known = self.held[slot] = torch.empty(floats)
        return known


workspace = Workspace()
