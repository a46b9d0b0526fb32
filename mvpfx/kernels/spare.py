"""What a chain is in torch's own operations, for the call in which native kernels fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Generated = tuple[Callable[..., Any], Sequence[tuple[dict[str, Any], str]]]
"""A function of tensors and then of what modules hold, and where they hold it."""


class Lost:
    """Stands for tiles that a chain did not hand on; the next one then does without its own."""

    def __repr__(self) -> str:
        return "LOST"


LOST = Lost()


class Spare:
    """The nodes that a chain was made of.

    They begin at tensors, not at tiles, so a chain can do without those before it.

    Args:
        generate: makes the function of them, from the tensors it reads to those that leave.
        count: how many tensors it reads.
        handed_on: how many values the chain hands on in tiles.
    """

    def __init__(self, generate: Callable[[], Generated], count: int, handed_on: int) -> None:
        self._generate = generate
        self._handed_on = handed_on
        self.count = count
        self.report: Callable[[str], None] | None = None
        """Is told why native kernels could not be used."""

    def run(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """What the chain returns, with `LOST` in place of tiles.

        Args:
            tensors: that it reads.
        """
        function, slots = self._generate()
        left = function(*tensors, *(holder[key] for holder, key in slots))
        return (*(LOST,) * self._handed_on, *left)
