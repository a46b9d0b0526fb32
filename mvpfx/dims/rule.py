"""The protocol of rules: how facts pass through one kind of node.

A rule answers three questions about a step: what its results are known to be, what of its inputs
is needed, and which removals its inputs and results agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from mvpfx.dims.value import Value

NONE = torch.zeros(1, dtype=torch.bool)
"""Allows no index to go."""


@dataclass(eq=False)
class Step:
    """One node with the values it reads and makes.

    Attributes:
        node: the node.
        name: what it computes, for people.
        module: what a call_module node calls.
        outputs: the values it makes.
        values: value of each input node, in the order of `node.all_input_nodes`.
        extra: what it reads besides: whole tuples, parameters of the module it calls.
        numbers: what each input node that is a number was in the recorded call.
        whole_groups: whether heads that share keys and values may only go together.
        attends: of an attention, whether every query has something to attend to, in any call.
    """

    node: fx.Node
    name: str
    module: nn.Module | None
    outputs: tuple[Value, ...]
    values: dict[fx.Node, Value] = field(default_factory=dict[fx.Node, Value])
    extra: dict[str, Value] = field(default_factory=dict[str, Value])
    numbers: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    whole_groups: bool = False
    attends: bool = False

    @property
    def inputs(self) -> list[Value]:
        """The values it reads: arguments, and parameters of the module it calls."""
        return [*self.values.values(), *self.extra.values()]

    @property
    def bias(self) -> fx.Node | None:
        """The bias parameter of a linear layer or convolution."""
        given = list(self.values)
        if len(given) != 3:
            return None
        return given[0] if self.name == "addmm" else given[2]

    @property
    def features(self) -> int:
        """The dimension of output features of a linear layer or convolution."""
        return 1 if self.name.startswith("conv") else len(self.outputs[0].shape) - 1

    def value(self, argument: Any) -> Value | None:
        """The value of an argument; None where it is no tensor."""
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument, numbers put in."""
        given: Any = default
        if len(self.node.args) > position:
            given = self.node.args[position]
        elif name in self.node.kwargs:
            given = self.node.kwargs[name]
        return self.concrete(given)

    def concrete(self, argument: Any) -> Any:
        """An argument with the numbers of the recorded call in it."""
        return replaced(argument, lambda node: self.numbers.get(node, node))


def replaced(argument: Any, known: Callable[[fx.Node], Any]) -> Any:
    """An argument with something else in the place of each node."""
    return map_arg(argument, known)


class Rule(Protocol):
    """How facts pass through one kind of node; one stateless object a kind."""

    def forward(self, step: Step) -> None:
        """Set `known` of the outputs."""

    def backward(self, step: Step) -> None:
        """Add to `needed` of the inputs."""

    def agree(self, step: Step) -> Iterator[Value]:
        """Take back removals that do not fit together; yields the values that changed."""
        ...


class Opaque:
    """A node of which nothing is known: all is needed, nothing may go."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def forward(self, step: Step) -> None:
        """Nothing is known."""

    def backward(self, step: Step) -> None:
        """All inputs are needed where anything is."""
        if any(bool(output.needed.any()) for output in step.outputs) or not step.outputs:
            for value in step.inputs:
                value.need(~value.needed)

    def agree(self, step: Step) -> Iterator[Value]:
        """Nothing may go."""
        yield from stay(all_dims(*step.inputs, *step.outputs), self.reason)


def all_dims(*values: Value) -> Iterator[tuple[Value, int]]:
    """Every dimension of some values."""
    return ((value, dim) for value in values for dim in range(len(value.shape)))


def stay(places: Iterable[tuple[Value, int]], reason: str) -> Iterator[Value]:
    """Let nothing go from dimensions; yields the values that changed."""
    for value, dim in places:
        if value.allow(dim, NONE, reason):
            yield value


def alike(places: list[tuple[Value, int]]) -> Iterator[Value]:
    """Let dimensions lose the same indices; yields the values that changed."""
    common = places[0][0].removed[places[0][1]]
    for value, dim in places[1:]:
        common = common & value.removed[dim]
    reasons = [_reason(value, dim, places) for value, dim in places]
    for (value, dim), reason in zip(places, reasons, strict=True):
        if value.allow(dim, common, reason):
            yield value


def _reason(value: Value, dim: int, places: list[tuple[Value, int]]) -> str:
    """Why a dimension cannot lose what it proposed: another one has to keep it."""
    found = ""
    for other, place in places:
        lacks = value.removed[dim] & ~other.removed[place]
        if other is value or not bool(lacks.any()):
            continue
        why = other.fixed[place] or other.reasons[place]
        if why is not None:
            return why
        found = found or f"{other.name} needs them"
    return found or "they are needed"
