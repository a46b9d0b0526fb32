"""HeldMask: what one mask has decided, until what it comes from changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from mvpfx.training_kernels import library


class HeldMask:
    """The units and weights that stay; in a bit a unit while nobody needs them.

    Between the backward of a layer and the next forward nobody reads its mask, and that is when
    the gradients of all scores are alive at once.

    Args:
        key: what they come from: the same object until it changes.
        kept: which units stay, bool `[r, c]`.
        mask: which weights do, bool, of the weight's shape; may be the same memory.

    Attributes:
        decision: kept and mask; None while packed.
    """

    def __init__(self, key: Hashable, kept: Tensor, mask: Tensor) -> None:
        self.key = key
        self.decision: tuple[Tensor, Tensor] | None = (kept, mask)
        self._units = kept.shape
        self._bits: Tensor | None = None

    def pack(self) -> None:
        """Hold no more than a bit a unit, where the native library can make and read that."""
        if self.decision is None or not library.packs(self.decision[0]):
            return
        if self._bits is None:
            self._bits = library.pack(self.decision[0])
        self.decision = None

    def unpack(self, expand: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Units and weights that stay, as they were.

        Args:
            expand: makes the mask of the weights from that of the units.
        """
        assert self._bits is not None, "packed"
        kept = library.unpack(self._bits, self._units)
        self.decision = decision = kept, expand(kept)
        return decision
