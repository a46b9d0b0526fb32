"""Convolutions in groups: whole groups go, and what all that stay can do without.

Shapes: `G` groups of `I` inputs and `O` outputs each. A weight is `[G * O, I, ...]`, a transposed
one `[G * I, O, ...]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.dims.channel_norm import per_channel
from mvpfx.dims.contraction import Fold, uniform_constants
from mvpfx.dims.convolution import Convolution
from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Value, any_slice, shrink_to


@dataclass(frozen=True)
class GroupedConvolution(Convolution):
    """A convolution with more than one group.

    Along the first dimension of the weight each group may lose channels of its own, as many as
    the others; along the second they lose the same places.

    Attributes:
        groups: how many there are.
    """

    groups: int = 1

    def forward(self, step: Step) -> None:
        """An output channel is constant where all channels that its weight reads are."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        constant, value = (part.view(self.groups, 1, -1) for part in self._foldable(x))
        found = ~(self._reads(weight) & ~constant).any(dim=2).flatten()
        total = (self._sums(weight) * torch.where(constant, value, 0.0)).sum(dim=2).flatten()
        if bias is not None:
            total = total + bias.known.value.double()
        if bool(found.any()):
            out.known = per_channel(found, total, len(out.shape))

    def backward(self, step: Step) -> None:
        """A channel is needed where an output that reads it is."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        needed = any_slice(out.needed, 1, out.shape[1])
        x.need(self._read_by(weight, needed).view([1, -1] + [1] * (len(x.shape) - 2)))
        weight.need(torch.ones((), dtype=torch.bool))
        if bias is not None:
            bias.need(shrink_to(needed, bias.shape))

    def agree(self, step: Step) -> Iterator[Value]:
        """Groups go with both their inputs and their outputs."""
        (out,) = step.outputs
        x, weight, bias = self.parts(step)
        slid = ((v, dim) for v, dim in all_dims(x, out, weight) if dim >= 2)
        yield from stay(slid, f"{step.name} slides over them")
        yield from alike([(x, 0), (out, 0)])
        if bias is not None:
            yield from alike([(out, 1), (bias, 0)])
        first, second = (x, out) if self.transposed else (out, x)
        yield from alike([(first, 1), (weight, 0)])
        own, shared = self._in_groups(first), self._in_groups(second)
        gone = own.all(dim=1) & shared.all(dim=1)
        free = self._in_groups(x) & self._free(step).view(self.groups, -1)
        own, shared = (own, free) if not self.transposed else (free, shared)
        left = ~gone
        count = int(own[left].sum(dim=1).min()) if bool(left.any()) else 0
        own = own & (own.cumsum(dim=1) <= count) | gone[:, None]
        common = weight.removed[1].clone()
        if bool(left.any()):
            common &= shared[left].all(dim=0)
        allowed = common & shared | gone[:, None]
        reason = f"{step.name} has groups, and each loses as many"
        changes = ((first, 1, own.flatten()), (second, 1, allowed.flatten()), (weight, 1, common))
        for value, dim, stays in changes:
            if value.allow(dim, stays, self._why(step, value, reason)):
                yield value

    def folds(self, step: Step) -> Iterator[Fold]:
        """What constants that go add to the bias."""
        x, weight, _ = self.parts(step)
        constant, value = self._foldable(x)
        taken = torch.where(x.removed[1] & constant, value, 0.0)
        added = (self._sums(weight) * taken.view(self.groups, 1, -1)).sum(dim=2).flatten()
        if bool(((added != 0) & ~step.outputs[0].removed[1]).any()):
            yield Fold(weight, step.bias, added, int((taken != 0).sum()))

    def kept_groups(self, step: Step) -> int:
        """The number of groups after the removal."""
        x, out = self._in_groups(self.parts(step)[0]), self._in_groups(step.outputs[0])
        return self.groups - int((x.all(dim=1) & out.all(dim=1)).sum())

    def module_sizes(self, step: Step) -> dict[str, int]:
        """What the attributes of the layer say after the removal."""
        x, out = self.parts(step)[0], step.outputs[0]
        sizes = {"in_channels": x.kept(1), "out_channels": out.kept(1)}
        return {**sizes, "groups": self.kept_groups(step)}

    def _why(self, step: Step, value: Value, reason: str) -> str:
        x = self.parts(step)[0]
        if value is x:
            foldable = self._free(step)
            constant, number = uniform_constants(x, 1)
            if bool((constant & (number != 0) & ~foldable & x.removed[1]).any()):
                return self._reason(x, foldable)
        return next((r for v in (x, step.outputs[0]) for r in v.fixed[1:2] if r), reason)

    def _free(self, step: Step) -> Tensor:
        """`[C]`: input channels that add nothing that a bias could not hold."""
        (out,) = step.outputs
        x, weight, _ = self.parts(step)
        constant, value = self._foldable(x)
        needed = any_slice(out.needed, 1, out.shape[1])
        return ~self._read_by(weight, needed) | (constant & ((value == 0) | self.has_bias))

    def _in_groups(self, value: Value) -> Tensor:
        return value.removed[1].view(self.groups, -1)

    def _grouped(self, tensor: Tensor) -> Tensor:
        """A weight as `[G, O, I, places]`."""
        parts = tensor.unflatten(0, (self.groups, -1)).flatten(3)
        return parts.transpose(1, 2) if self.transposed else parts

    def _reads(self, weight: Value) -> Tensor:
        return (self._grouped(weight.known.value) != 0).any(dim=3)

    def _sums(self, weight: Value) -> Tensor:
        return self._grouped(weight.known.value).double().sum(dim=3)

    def _read_by(self, weight: Value, needed: Tensor) -> Tensor:
        """`[C]`: input channels that outputs read which are `needed`, `[N]`."""
        return (self._reads(weight) & needed.view(self.groups, -1, 1)).any(dim=1).flatten()
