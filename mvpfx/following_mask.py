"""FollowingMask: the mask of a weight whose units are scored by the mask of another weight."""

from __future__ import annotations

from torch import Tensor

from mvpfx.mask import Mask
from mvpfx.schedule import Schedule


class FollowingMask(Mask):
    """Keeps the hidden channels that its leader keeps, and adds to the gradient of their scores.

    It has no scores, averages or ranking of its own: the scores of a channel receive
    `dL/dW' * W` summed over what the channel has of all weights that make and read it.

    Args:
        site: whose weight this is.
        weight: the parameter, with values.
        rule: how to prune it; the leader's, but for the granularity.
    """

    def make_scores(self) -> None:
        """None of its own."""

    def make_room(self, schedule: Schedule | None, units: tuple[int, int]) -> None:
        """Hold the weight that is remembered; the leader freezes."""
        super().make_room(schedule, units)
        self.frozen_kept = None

    @property
    def measures(self) -> bool:
        """Never: the leader does."""
        return False

    def decide(self) -> Tensor:
        """What the leader keeps."""
        return self._as_own(self._leader.kept())

    def learned_scores(self) -> Tensor | None:
        """The leader's, in the shape of this weight's units."""
        scores = self._leader.scores
        return None if scores is None else self._as_own(scores)

    def stored(self) -> Tensor | None:
        """The leader's, likewise."""
        leader = self.__dict__.get("leader")
        copied = leader is not None and "_parameters" in vars(leader)  # not while it is copied
        scores = leader.stored() if leader is not None and copied else None
        return None if scores is None else self._as_own(scores)

    @property
    def _leader(self) -> Mask:
        assert self.leader is not None, "its leader was made"
        return self.leader

    def _as_own(self, units: Tensor) -> Tensor:
        return units.reshape(self.granularity.units_shape(self.site))
