"""What one hidden channel has of each weight that makes or reads it.

Which weights these are shows in the graphs, see `mvpfx.dims.coupling`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelUnit:
    """The part of one weight that belongs to one channel between two matmuls.

    Attributes:
        group: name of the weight that reads the channels first; all weights of the group share it.
        rows: outputs of one channel that are neighbours, for a weight that makes channels; None for
            one that reads them.
        copies: at how many places along the outputs a channel has as many rows: 2 where one weight
            makes both halves of a gated layer.
        cols: inputs of one channel, for a weight that reads channels; None for one that makes them.
    """

    group: str
    rows: int | None
    copies: int
    cols: int | None

    @property
    def reads(self) -> bool:
        """Whether the weight reads the channels."""
        return self.cols is not None
