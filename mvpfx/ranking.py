"""Rankings: exact top-v over the units of one mask, or of a pool of masks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvpfx.distributed import gathered, kept_counts
from mvpfx.interception import forward_number
from mvpfx.top_v import top_v

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Ranking:
    """The masks whose units are ranked together: one mask in local scope, a pool in global scope.

    Exactly `round(density * units)` units stay, a unit of any size counting as one. Among units of
    equal importance those of earlier sites stay first, and within a site those of lower flat index.
    In local scope each part of a stacked site (each expert) is ranked by itself.

    Attributes:
        masks: the members, in order of their sites.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        self.masks = list(masks)
        self._state: Hashable = None
        self._forward: int | None = None
        self._key: Hashable = None
        self._kept: list[Tensor | None] = []
        self._counts: list[int] = []

    def __getstate__(self) -> dict[str, object]:
        return vars(Ranking(self.masks))

    def forget(self) -> None:
        """Rank anew at the next use."""
        self._state = self._forward = self._key = None
        self._kept, self._counts = [], []

    def state(self) -> Hashable:
        """What the ranking depends on: the same object as long as the masks are the same.

        Within one forward a pool is looked at once, or every member would look at all the others:
        what is written to scores inside of a forward counts from the next one on.
        """
        forward = forward_number() if len(self.masks) > 1 else None
        if forward is None or forward != self._forward:
            state = tuple(mask.own_state() for mask in self.masks)
            self._forward = forward
            if state != self._state:
                self._state = state
        return self._state

    def kept(self, mask: Mask) -> Tensor:
        """Which units of `mask` stay, bool `[r, c]`.

        Given away: each mask holds its own. One that asks again has all of them ranked again.

        Raises:
            ValueError: if a member has NaN scores, or the members' densities differ.
        """
        key, place = self.state(), self._place(mask)
        if any(member.shard is not None for member in self.masks):
            importance = gathered(mask.criterion.importance(mask))
            if len(self.masks) == 1:
                return self._top_alone(importance)
            if key is not self._key or not self._counts:
                self._counts, self._key = self._kept_counts(), key
            return top_v([importance], self._counts[place])[0]
        if key is not self._key or not self._kept or self._kept[place] is None:
            self._kept[:], self._key = self._select(), key
        kept, self._kept[place] = self._kept[place], None
        assert kept is not None, "just selected"
        return kept

    def _place(self, mask: Mask) -> int:
        return next(i for i, member in enumerate(self.masks) if member is mask)

    def _top_alone(self, importance: Tensor) -> Tensor:
        """What the only member keeps: of each of its parts as much, where it is of local scope."""
        mask, density = self.masks[0], self._density()
        importance = mask.granularity.protect(importance)
        stacked = mask.site.parts if mask.rule.scope == "local" else 1
        if stacked == 1:
            return top_v([importance], round(density * importance.numel()))[0]
        parts = importance.chunk(stacked)
        return torch.cat([top_v([part], round(density * part.numel()))[0] for part in parts])

    def _kept_counts(self) -> list[int]:
        """How many units each member keeps, where they are sharded over ranks."""
        count = round(self._density() * sum(mask.units for mask in self.masks))
        return kept_counts(self.masks, [m.criterion.importance(m) for m in self.masks], count)

    def _density(self) -> float:
        """The density of all members.

        Raises:
            ValueError: if they differ.
        """
        first = self.masks[0]
        density = first.density
        for mask in self.masks:
            if mask.density != density:
                raise ValueError(
                    f"{mask.site.name} has density {mask.density} and {first.site.name} has "
                    f"{density}, but they are ranked together. Set the density of all masks of a "
                    "pool, or use SparsityScheduler, which does."
                )
        return 1.0 if density is None else density

    def _select(self) -> list[Tensor]:
        density = self._density()
        importances = [mask.criterion.importance(mask) for mask in self.masks]
        for mask, importance in zip(self.masks, importances, strict=True):
            mask.check_finite(importance)
        if len(self.masks) == 1:
            return [self._top_alone(importances[0])]
        units = sum(importance.numel() for importance in importances)
        return top_v(importances, round(density * units))


def leading(masks: Iterable[Mask]) -> list[Mask]:
    """Those that have units of their own to rank; the others keep what their leaders keep."""
    return [mask for mask in masks if mask.leader is None]


def rank_together(masks: Iterable[Mask]) -> list[Ranking]:
    """Give each mask its ranking, and return the rankings; forgets those they were in before.

    Masks of global scope that share criterion, its options and density are ranked together; all
    others alone, and those that keep N of each M, where the groups leave no choice between sites.

    Args:
        masks: all masks of a model, in order of their sites.
    """
    pools: dict[Hashable, list[Mask]] = {}
    for mask in leading(masks):
        rule = mask.rule
        grouped = rule.granularity.group is not None
        together = rule.scope == "global" and mask.criterion.pooled and not grouped
        options = tuple(sorted(rule.criterion_options.items()))
        key = (rule.criterion, options, rule.density) if together else id(mask)
        pools.setdefault(key, []).append(mask)
    rankings = [Ranking(members) for members in pools.values()]
    for ranking in rankings:
        for mask in ranking.masks:
            for member in (mask, *mask.followers):
                member.ranking = ranking
    return rankings
