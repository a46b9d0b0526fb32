"""The analysis: facts forward, needs backward, and the largest removal all nodes agree on."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import cached_property

import torch

from mvpfx.dims.attention import Attention
from mvpfx.dims.contraction import Contraction, Fold
from mvpfx.dims.convolution import Convolution
from mvpfx.dims.elementwise import Elementwise
from mvpfx.dims.projected_attention import ProjectedAttention
from mvpfx.dims.reading import RESULT, RETURNED, Reading
from mvpfx.dims.rearrangement import Rearrangement
from mvpfx.dims.rule import NONE, Step, all_dims
from mvpfx.dims.stack import GroupedProduct
from mvpfx.dims.value import Value, any_slice

UNREAD = "no node shows how it is used"
ONE = "one always stays"
HEAD_DIM = 1
"""The dimension of heads in attention weights."""
_TAKE_NOTHING = (Contraction, Elementwise, Rearrangement, ProjectedAttention)
"""Rules of nodes that may be left with dimensions of size 0; what is left is run as a proof."""


class Flow(Reading):
    """What is known, needed and removed in one region."""

    def solve(self, returned: bool = False) -> None:
        """Find the facts, the needs and the removal.

        Args:
            returned: whether attention weights that the region returns may lose heads.
        """
        for step, rule in self.steps:
            rule.forward(step)
        weights = [value for value in self.results if self._is_attended(value)]
        for value in weights:
            value.fixed[HEAD_DIM] = None if returned else RETURNED
            value.needed = torch.zeros_like(value.needed) if returned else value.needed
        self._decide()
        computed = [any_slice(v.needed, HEAD_DIM, v.shape[HEAD_DIM]) for v in weights]
        left = [~v.removed[HEAD_DIM] & ~live for v, live in zip(weights, computed, strict=True)]
        if any(bool(stays.any()) for stays in left):  # as a head whose values are constant
            for value in weights:
                value.need(torch.ones_like(value.needed))
                value.fixed[HEAD_DIM] = RESULT
            self._decide()

    def _is_attended(self, value: Value) -> bool:
        """Whether a value holds attention weights, `[B, H, S, T]`."""
        made = [step for step, rule in self.steps if isinstance(rule, Attention)]
        last = len(value.shape) - 1
        returned = any(value in step.outputs[1:] for step in made)
        return last == 3 and (returned or value.sums_to_one == last)

    def _decide(self) -> None:
        """Find the needs and the removal."""
        for step, rule in reversed(self.steps):
            rule.backward(step)
        for value in self.all_values():
            if value.follows and id(value) not in self.readers:
                value.fixed = [UNREAD] * len(value.shape)
            value.start()
        self.settle([step for step, _ in self.steps])
        self.keep_one(self._never_empty(), ONE)

    @property
    def size(self) -> int:
        """How many indices go, over all values."""
        return sum(int(along.sum()) for v in self.all_values() for along in v.removed)

    @property
    def removes(self) -> bool:
        """Whether anything goes from a parameter."""
        return any(v.kept_shape != v.shape for v in self.parameters.values())

    def block(self, steps: list[Step], reason: str) -> None:
        """Take back all removals from what `steps` read and make."""
        touched: list[Step] = []
        for step in steps:
            for value, dim in all_dims(*step.inputs, *step.outputs):
                if value.allow(dim, NONE, reason):
                    value.reasons[dim] = reason  # whatever took back some of it before
                    touched += self.readers[id(value)]
        self.settle(touched)
        self.keep_one(self._never_empty(), ONE)

    def round_up(self, multiple: int) -> None:
        """Keep some of what is dead, so that sizes of weights are multiples of `multiple`.

        A size that was no multiple before may stay as it was.
        """
        while True:
            uneven = [
                (value, dim, whole)
                for value, whole in self._multiples(multiple)
                for dim in range(len(value.shape))
                if len(value.shape) > 1 and value.kept(dim) % whole > 0
                if value.kept(dim) < value.shape[dim]
            ]
            if not uneven:
                return
            value, dim, whole = uneven[0]
            lacking = whole - value.kept(dim) % whole
            going = value.removed[dim]
            # By halves: a unit of a fused gated layer stands in its weight twice.
            allowed = going & (going.cumsum(0) > max(1, lacking // 2))
            value.allow(dim, allowed, f"sizes are multiples of {whole}")
            self.settle(self.readers[id(value)])

    def _multiples(self, multiple: int) -> Iterator[tuple[Value, int]]:
        """Values whose sizes are multiples of something, and of what."""
        for value in self.all_values():
            asked = multiple if value.name in self.parameters else 1
            whole = math.lcm(asked, value.multiple)
            if whole > 1:
                yield value, whole

    def keep_one(self, values: list[Value], reason: str) -> bool:
        """Let no dimension of some values become empty; whether any did."""
        found = False
        values = sorted(values, key=lambda value: value.follows)  # parameters keep no reasons
        while True:
            empty = next((value for value in values if value.empties), None)
            if empty is None:
                return found
            found, dim = True, empty.empties[0]
            first = torch.ones(empty.shape[dim], dtype=torch.bool)
            first[0] = False
            empty.allow(dim, first, reason)
            self.settle(self.readers[id(empty)])

    def _never_empty(self) -> list[Value]:
        """What is read or made by nodes that are not known to compute without any element."""
        return [
            value
            for step, rule in self.steps
            if not isinstance(rule, _TAKE_NOTHING) or isinstance(rule, GroupedProduct)
            for value in (*step.inputs, *step.outputs)
        ]

    def settle(self, steps: list[Step]) -> None:
        """Let rules take back what does not fit until all agree."""
        queue = deque(steps)
        waiting = set(map(id, queue))
        rules = {id(step): rule for step, rule in self.steps}
        while queue:
            step = queue.popleft()
            waiting.discard(id(step))
            for value in rules[id(step)].agree(step):
                for other in self.readers[id(value)]:
                    if id(other) not in waiting:
                        waiting.add(id(other))
                        queue.append(other)

    @cached_property
    def readers(self) -> dict[int, list[Step]]:
        """The steps that read or make each value."""
        found: dict[int, list[Step]] = defaultdict(list)
        for step, _ in self.steps:
            for value in {id(v): v for v in (*step.inputs, *step.outputs)}.values():
                found[id(value)].append(step)
        return found

    def all_values(self) -> list[Value]:
        """Every value once."""
        found: dict[int, Value] = {}
        for made in self.values.values():
            for value in made if isinstance(made, tuple) else (made,):
                if isinstance(value, Value):
                    found[id(value)] = value
        for value in self.parameters.values():
            found[id(value)] = value
        return list(found.values())


def folds_of(flow: Flow) -> Iterator[tuple[Step, Fold]]:
    """The steps with a bias that takes constants, and what it takes."""
    for step, rule in flow.steps:
        if isinstance(rule, (Contraction, Convolution, ProjectedAttention)):
            yield from ((step, fold) for fold in rule.folds(step))
