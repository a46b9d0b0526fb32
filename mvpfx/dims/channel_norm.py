"""Layers with parameters per channel: normalisation over channels in groups, and PReLU.

Shapes: input and result `[B, C, ...]`, parameters `[C]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvpfx.dims.contraction import uniform_constants
from mvpfx.dims.rule import Step, alike, stay
from mvpfx.dims.slicewise import in_blocks
from mvpfx.dims.value import Known, Value, compact

_NAMES = ("weight", "bias", "running_mean", "running_var")


def parameter_values(step: Step, places: dict[str, int]) -> dict[str, Value]:
    """The parameters that a step reads by their names: of its module, or among its arguments.

    Args:
        step: of a layer, or of the function of the same name.
        places: where the function takes each.
    """
    if step.module is not None:
        return {name: step.extra[name] for name in _NAMES if name in step.extra}
    found = {name: step.value(step.argument(place, name)) for name, place in places.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """A normalisation over groups of neighbouring channels: one group may be one channel.

    Attributes:
        groups: how many there are.
        eps: added to the variance.
        parameters: weight and bias, where there are any.
        counts: whether the number of groups is an argument of the function.
    """

    groups: int
    eps: float
    parameters: dict[str, Value]

    def forward(self, step: Step) -> None:
        """A group of constant channels is constant."""
        (out,), x = step.outputs, step.inputs[0]
        constant, value = uniform_constants(x, 1)
        whole = constant.unflatten(0, (self.groups, -1)).all(dim=1, keepdim=True)
        if not bool(whole.any()):
            return
        parts = value.unflatten(0, (self.groups, -1))
        centred = parts - parts.mean(dim=1, keepdim=True)
        spread = centred.square().mean(dim=1, keepdim=True)
        normed = (centred * torch.rsqrt(spread + self.eps)).flatten()
        for name, change in (("weight", torch.mul), ("bias", torch.add)):
            if name in self.parameters:
                normed = change(normed, self.parameters[name].known.value.double())
        found = whole.expand(parts.shape).flatten()
        out.known = per_channel(found, normed, len(out.shape))

    def backward(self, step: Step) -> None:
        """A group is needed where any of it is."""
        (out,), (x, *others) = step.outputs, step.inputs
        size = out.shape[1]
        needed = out.needed.any(dim=tuple(range(2, len(out.shape))), keepdim=True)
        if size > self.groups and needed.shape[1] > 1:
            whole = needed.unflatten(1, (self.groups, -1)).any(dim=2)
            needed = whole.repeat_interleave(size // self.groups, 1)
        x.need(needed)
        for other in others:
            other.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """Whole groups go, with their parameters."""
        (out,), x = step.outputs, step.inputs[0]
        slid = ((v, dim) for v in (x, out) for dim in range(2, len(v.shape)))
        yield from stay(slid, f"{step.name} computes over them")
        yield from alike([(x, 0), (out, 0)])
        size = out.shape[1] // self.groups
        held = [(value, 0, size) for value in self.parameters.values()]
        yield from in_blocks([(x, 1, size)], [(out, 1, size), *held], step.name)

    def kept_groups(self, step: Step) -> int:
        """The number of groups after the removal."""
        out = step.outputs[0]
        return out.kept(1) * self.groups // out.shape[1]

    def module_sizes(self, step: Step) -> dict[str, int]:
        """What the attributes of the layer say after the removal."""
        kept = step.outputs[0].kept(1)
        if hasattr(step.module, "num_groups"):
            return {"num_channels": kept, "num_groups": self.kept_groups(step)}
        return {"num_features": kept}


@dataclass(frozen=True, eq=False)
class ChannelSlope:
    """PReLU: a slope for each channel, or one for all."""

    slope: Value

    def forward(self, step: Step) -> None:
        """Negative constants are multiplied by their slope."""
        (out,), x = step.outputs, step.inputs[0]
        if x.known.is_nothing:
            return
        shape = [-1 if dim == 1 else 1 for dim in range(len(x.shape))]
        value = x.known.value.double()
        slope = self.slope.known.value.double().view(shape)
        value = torch.where(value > 0, value, value * slope)
        out.known = Known(x.known.constant, compact(torch.where(x.known.constant, value, 0.0)))

    def backward(self, step: Step) -> None:
        """Needed where the result is."""
        (out,), (x, *others) = step.outputs, step.inputs
        x.need(out.needed)
        for other in others:
            other.need(torch.ones((), dtype=torch.bool))

    def agree(self, step: Step) -> Iterator[Value]:
        """All lose the same channels."""
        (out,), x = step.outputs, step.inputs[0]
        own = [(self.slope, 0)] if self.slope.shape[0] > 1 else []
        for dim in range(len(out.shape)):
            yield from alike([(out, dim), (x, dim), *(own if dim == 1 else [])])
        if not own:
            yield from stay([(self.slope, 0)], "one slope serves all channels")

    def module_sizes(self, step: Step) -> dict[str, int]:
        """What the attributes of the layer say after the removal."""
        return {"num_parameters": self.slope.kept(0)}


@dataclass(frozen=True)
class Gate:
    """`glu`: one half of a dimension times the sigmoid of the other."""

    dim: int

    def forward(self, step: Step) -> None:
        """Constant where both halves are, or the first is zero."""
        (out,), x = step.outputs, step.inputs[0]
        if x.known.is_nothing:
            return
        constant, gate = self._halves(x.known.constant)
        value, gate_value = self._halves(torch.where(x.known.constant, x.known.value.double(), 0.0))
        zero = constant & (value == 0)
        found = zero | (constant & gate)
        product = torch.where(zero, 0.0, value * gate_value.sigmoid())
        out.known = Known(compact(found), compact(torch.where(found, product, 0.0)))

    def backward(self, step: Step) -> None:
        """A gate of zeros is not needed."""
        (out,), x = step.outputs, step.inputs[0]
        first, _ = self._halves(x.known.zero)
        gate = out.needed & ~first
        sizes = [out.shape[d] if d == self.dim else max(a, b) for d, (a, b) in
                 enumerate(zip(out.needed.shape, gate.shape, strict=True))]  # fmt: skip
        x.need(torch.cat((out.needed.expand(sizes), gate.expand(sizes)), dim=self.dim))

    def agree(self, step: Step) -> Iterator[Value]:
        """An index goes with its gate."""
        (out,), x = step.outputs, step.inputs[0]
        for dim in range(len(out.shape)):
            if dim != self.dim:
                yield from alike([(x, dim), (out, dim)])
                continue
            common = x.removed[dim].unflatten(0, (2, -1)).all(dim=0) & out.removed[dim]
            why = x.fixed[dim] or out.fixed[dim] or out.reasons[dim] or "their gate or value stays"
            for value, allowed in ((x, common.repeat(2)), (out, common)):
                if value.allow(dim, allowed, why):
                    yield value

    def _halves(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        if tensor.shape[self.dim] == 1:
            return tensor, tensor
        one, other = tensor.chunk(2, dim=self.dim)
        return one, other


def per_channel(constant: Tensor, value: Tensor, dims: int) -> Known:
    """What is known of `[B, C, ...]` by channel: `[C]` and `[C]`."""
    shape = [-1 if dim == 1 else 1 for dim in range(dims)]
    return Known(constant.view(shape), torch.where(constant, value, 0.0).view(shape))
