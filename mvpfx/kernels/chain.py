"""Chains: steps that are done in one call of the library.

No step but an attention needs more than its own token, so the library takes one tile through the
steps before the next, and one sequence before the next: what lies between two steps stays in cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from mvpfx.kernels.prepared_chain import PreparedChain
from mvpfx.kernels.spare import LOST, Spare
from mvpfx.kernels.step import Place, Step
from mvpfx.kernels.tiles import Tiles
from mvpfx.kernels.weight import PackedCache
from mvpfx.net import caught

MOST_PREPARED = 16
"""Sizes of calls that a chain is kept ready for, in each thread."""


class _Prepared(threading.local):
    """What a thread has ready, by leading sizes and dtype."""

    def __init__(self) -> None:
        self.known: dict[tuple[tuple[int, ...], torch.dtype], PreparedChain] = {}


class Chain:
    """Steps, compiled once.

    Args:
        steps: in their order.
        places: of all values by number.
        results: what the call returns: numbers of values that are handed on in tiles; tensors that
            leave follow them, in the order of their steps.
        spare: does the same without native kernels where they fail; None raises what they raised.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        places: Sequence[Place],
        results: Sequence[int],
        spare: Spare | None = None,
    ) -> None:
        self.spare = spare
        self.steps = tuple(steps)
        self.places = tuple(places)
        self.results = tuple(results)
        entering = (s.sources[0] for s in steps if s.kind == "enter" and not s.beside)
        tiled = (place.argument for place in places if place.argument is not None)
        self._tiled = tuple(tiled)
        self._like = next(iter((*entering, *self._tiled)))
        self.slots: dict[int, int] = {}
        for place in self.places:
            if place.slot is not None:
                most = max(self.slots.get(place.slot, 0), place.features)
                self.slots[place.slot] = most
        self._packed = [PackedCache() for _ in self.steps]
        self._prepared = _Prepared()

    def __repr__(self) -> str:
        return f"Chain of {len(self.steps)} steps"

    @property
    def __name__(self) -> str:
        return "chain"

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Run the steps.

        Args:
            arguments: tensors that enter, tiles, sparse layers and norm weights, as steps and
                places refer to them; then the tensors that `spare` reads.

        Returns:
            Tiles of the values in `results`, then a tensor for each "leave".
        """
        spare = self.spare
        if spare is None:
            return self._run(arguments)
        own = len(arguments) - spare.count
        if any(arguments[i] is LOST for i in self._tiled):
            return spare.run(arguments[own:])
        try:
            return self._run(arguments)
        except Exception as error:  # noqa: BLE001  the net
            reason = caught(error, "a chain on native kernels")
        if spare.report is not None:
            spare.report(reason)
        return spare.run(arguments[own:])

    def _run(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        like = arguments[self._like]
        front = like.front if isinstance(like, Tiles) else tuple(like.shape[:-1])
        known = self._prepared.known
        prepared = known.get((front, like.dtype))
        if prepared is None or not prepared.serves(arguments):
            packed = [
                cache.of([arguments[i] for i in step.sources]) if step.kind == "multiply" else None
                for cache, step in zip(self._packed, self.steps, strict=True)
            ]
            prepared = PreparedChain(self, like, arguments, packed)
            if len(known) >= MOST_PREPARED:
                known.clear()
            known[front, like.dtype] = prepared
        return prepared.run(arguments)
