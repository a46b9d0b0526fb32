"""Whether weights are what they were, where nobody counts what is written to them.

Torch counts writes to a tensor, but not those through `.data` or a NumPy array that shares its
memory, and none at all of tensors that were made in inference mode. Such writes are looked for in
the values themselves: after `train`, `eval`, `to` and their like, and in each call for tensors of
inference mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

_WORDS = 2**17
"""Of 8 bytes, that are looked at together."""
_BASE = 0x9E3779B97F4A7C15
_RANGE = 2**64


class Looks:
    """Counts the occasions at which weights may have changed unseen."""

    count = 0


looks = Looks()


class LooksAgain(nn.Module):
    """A module whose packed weights are compared with its values after `train`, `eval` or `to`."""

    def train(self, mode: bool = True) -> Self:
        """As for any module."""
        looks.count += 1
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        looks.count += 1
        return super()._apply(fn, recurse)


@functools.cache
def _factors() -> Tensor:
    """Odd numbers, so that no change of a single word goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1


def fingerprint(tensor: Tensor) -> int:
    """A number of 64 bits that other values hardly ever have; of a tensor on the CPU.

    >>> fingerprint(torch.zeros(3)) == fingerprint(torch.zeros(3))
    True
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    words, found, factors = flat[:whole].view(torch.int64), len(flat), _factors()
    for part in words.split(_WORDS):
        found = (found * _BASE + int(torch.dot(part, factors[: len(part)]))) % _RANGE
    rest = int.from_bytes(bytes(flat[whole:].tolist()), "little")
    return (found * _BASE + rest) % _RANGE
