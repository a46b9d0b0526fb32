"""Make parameters of weights with zeros that are computed in each call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mvpfx.computed import PRUNED, Computed, duplicate, find_computed, make_plain, value_of
from mvpfx.example import inference
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program
from mvpfx.weights import parameter_names

ACTION = "fold into a parameter"


@dataclass(frozen=True)
class FoldComputed(Pass):
    """Do to a copy of the model what `torch.nn.utils.prune.remove` does.

    A parametrized weight is folded where it has zeros and is the same in each call; where it has
    none there is nothing to gain, and it stays what it is.
    """

    name: ClassVar[str] = "fold_computed"

    def apply(self, program: Program) -> Iterator[Decision]:
        """Put a model without these computations in the place of the program's."""
        computed = list(find_computed(program.model))
        if not computed:
            return
        model = duplicate(program.model)
        aliases = parameter_names(model)
        made: dict[Computed, Tensor | nn.Parameter] = {}
        with inference(model):
            values = {one: value_of(model, one) for one in computed}
            obstacles = {one: _obstacle(program, model, one, values[one]) for one in computed}
        for one in computed:
            obstacle = obstacles[one]
            if obstacle is not None:
                yield Decision(one.name, ACTION, False, f"{one.way} computes it, and {obstacle}")
                continue
            tied = {other for name in one.originals for other in aliases.get(name, ())}
            fellow = _fellow(made, tied, values, one)
            made[one] = _holder(model, one, values[one]) if fellow is None else fellow
            density = int(torch.count_nonzero(values[one])) / max(values[one].numel(), 1)
            reason = f"{one.way} computed it in each call; density {density:.4f}"
            apart = sorted(tied - set(one.originals))
            if apart and fellow is None:
                reason += f"; no longer tied to {', '.join(apart)}"
            yield Decision(one.name, ACTION, True, reason)
        if made:
            make_plain(model, made)
            program.model = model


def _obstacle(program: Program, model: nn.Module, one: Computed, value: Tensor) -> str | None:
    """Why a computed weight stays, None where it can be folded."""
    if program.graphs:
        return "graphs of earlier calls show it; pass example_inputs= to convert"
    if one.way == PRUNED:
        return None
    if not bool((value == 0).any()):
        return "none of its values is zero"
    if not torch.equal(value, value_of(model, one)):
        return "its values are others each time"
    return None


def _fellow(
    made: dict[Computed, Tensor | nn.Parameter],
    tied: set[str],
    values: dict[Computed, Tensor],
    one: Computed,
) -> Tensor | nn.Parameter | None:
    """A weight that was folded from the same original to the same values; the two stay tied."""
    for other, holder in made.items():
        if tied & set(other.originals) and torch.equal(values[other], values[one]):
            return holder
    return None


def _holder(model: nn.Module, one: Computed, value: Tensor) -> Tensor | nn.Parameter:
    """A parameter where an original is one, else a buffer."""
    known = dict(model.named_parameters(remove_duplicate=False))
    originals = [known[name] for name in one.originals if name in known]
    if not originals:
        return value
    return nn.Parameter(value, requires_grad=any(p.requires_grad for p in originals))
