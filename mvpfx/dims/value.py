"""What is known of a tensor in a graph: its constants, what of it is needed, what may go.

Masks and constants are compact: they have the tensor's number of dimensions, and size 1 along
those where nothing varies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """Which elements are the same for every input, and what they are; on the CPU.

    Attributes:
        constant: bool, compact.
        value: compact; meaningless where `constant` is False.
    """

    constant: Tensor
    value: Tensor

    @classmethod
    def nothing(cls, dims: int) -> Known:
        """No element is constant."""
        shape = (1,) * dims
        return cls(torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def all(cls, value: Tensor) -> Known:
        """A parameter, or what is computed from parameters alone; nothing if it is complex."""
        if value.is_complex():
            return cls.nothing(value.dim())
        return cls(torch.ones((1,) * value.dim(), dtype=torch.bool), value)

    @cached_property
    def zero(self) -> Tensor:
        """Where an element is known to be zero."""
        return self.constant & (self.value == 0)

    @cached_property
    def is_all(self) -> bool:
        """Whether every element is constant."""
        return bool(self.constant.all())

    @cached_property
    def is_nothing(self) -> bool:
        """Whether no element is."""
        return not bool(self.constant.any())


@dataclass(eq=False)
class Value:
    """One tensor in a graph, or one parameter.

    Attributes:
        name: for people.
        shape: sizes in the recorded call.
        fixed: for each dimension why its size may not change, or None.
        known: which elements are constant.
        needed: bool, compact: which elements can make a difference to the region's results.
        removed: for each dimension bool `[size]`: the indices that go.
        reasons: for each dimension, what kept an index that was dead.
        sums_to_one: the dimension along which elements sum to one, as after a softmax.
        multiple: what its sizes stay multiples of, where a kernel needs that.
        varies: for each dimension whether its size depends on the call.
        follows: whether it loses what the values computed from it lose, as a parameter does.
    """

    name: str
    shape: tuple[int, ...]
    fixed: list[str | None]
    known: Known
    needed: Tensor
    removed: list[Tensor] = field(default_factory=list[Tensor])
    reasons: list[str | None] = field(default_factory=list["str | None"])
    sums_to_one: int | None = None
    multiple: int = 1
    varies: tuple[bool, ...] = ()
    follows: bool = False

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], known: Known | None = None) -> Value:
        """A value of which nothing is decided yet."""
        dims = len(shape)
        needed = torch.zeros((1,) * dims, dtype=torch.bool)
        return cls(name, shape, [None] * dims, known or Known.nothing(dims), needed)

    def need(self, mask: Tensor) -> None:
        """Add to what is needed; `mask` is compact or whole."""
        self.needed = compact(self.needed | mask)

    def start(self) -> None:
        """Propose for removal what is dead: constant or not needed along all other dimensions.

        What follows others proposes everything.
        """
        dead = ~self.needed | self.known.constant
        self.reasons = [None] * len(self.shape)
        self.removed = []
        for dim, size in enumerate(self.shape):
            along = slices(dead, dim, size)
            if self.follows:
                along = torch.ones(size, dtype=torch.bool)
            if self.fixed[dim] is not None or size == 1:
                along = torch.zeros(size, dtype=torch.bool)
            self.removed.append(along)

    def allow(self, dim: int, allowed: Tensor, reason: str | None) -> bool:
        """Take back the removal of what is not `allowed`; whether that changed anything."""
        before = self.removed[dim]
        after = before & allowed
        if torch.equal(before, after):
            return False
        self.removed[dim] = after
        if self.reasons[dim] is None and not self.follows:
            self.reasons[dim] = reason
        return True

    def elements(self) -> Tensor:
        """Which elements go, compact: those at an index that goes along any dimension."""
        gone = torch.zeros((1,) * len(self.shape), dtype=torch.bool)
        for dim, along in enumerate(self.removed):
            if bool(along.any()):
                gone = gone | along.view([-1 if d == dim else 1 for d in range(len(self.shape))])
        return gone

    def kept(self, dim: int) -> int:
        """Size of a dimension after the removal."""
        return self.shape[dim] - int(self.removed[dim].sum())

    @property
    def empties(self) -> list[int]:
        """The dimensions that lose all they have."""
        return [d for d, size in enumerate(self.shape) if size > 0 and self.kept(d) == 0]

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """All sizes after the removal."""
        return tuple(self.kept(dim) for dim in range(len(self.shape)))

    def keep(self, tensor: Tensor) -> Tensor:
        """What stays of a tensor of this shape."""
        for dim, along in enumerate(self.removed):
            if bool(along.any()):
                tensor = tensor.index_select(dim, (~along).nonzero().flatten().to(tensor.device))
        return tensor


def slices(mask: Tensor, dim: int, size: int) -> Tensor:
    """For each index along `dim`: whether `mask` (compact) holds in all of the slice. `[size]`."""
    others = [d for d in range(mask.dim()) if d != dim]
    along = mask.all(dim=others) if others else mask
    return along.expand(size).clone()


def any_slice(mask: Tensor, dim: int, size: int) -> Tensor:
    """For each index along `dim`: whether `mask` (compact) holds anywhere in the slice."""
    return ~slices(~mask, dim, size)


def compact(tensor: Tensor) -> Tensor:
    """`tensor` with size 1 along each dimension in which it does not vary."""
    for dim, size in enumerate(tensor.shape):
        if size > 1:
            first = tensor.narrow(dim, 0, 1)
            if torch.equal(first.expand_as(tensor), tensor):
                tensor = first
    return tensor


def shrink_to(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of a broadcast result, as the mask of an operand of `shape`: True where any is."""
    while mask.dim() > len(shape):
        mask = mask.any(dim=0)
    for dim, size in enumerate(shape):
        if size == 1 and mask.shape[dim] > 1:
            mask = mask.any(dim=dim, keepdim=True)
    return mask
