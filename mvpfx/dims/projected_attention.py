"""`nn.MultiheadAttention` as one node: its four projections and the heads between them.

Shapes: `E` width of the model, `H` heads of width `D`, `I = H * D`. The weights to heads are
`[I, ...]` each or stacked, `[3 * I, E]`; the weight from heads is `[E, I]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mvpfx.dims.attention import UNATTENDED, WIDTH
from mvpfx.dims.contraction import Fold, uniform_constants
from mvpfx.dims.rule import Opaque, Rule, Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, any_slice
from mvpfx.program import Program, full_name
from mvpfx.reduced_attention import ReducedAttention, reduced_attention_forward
from mvpfx.swap import original_class

MIXED = "attention computes over them"
AVERAGED = "the attention weights that are read belong to all heads"
MASKED = "its mask has a matrix for each head"
FOREIGN = "multi_head_attention_forward is not called by an nn.MultiheadAttention"
STATIC = "multi_head_attention_forward has keys or values that are given"
_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_PARAMETERS = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", *_WEIGHTS)
_POSITIONS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_Place = tuple[Value, int, tuple[int, ...]]
"""A parameter, its dimension of heads, and where along it the heads start, once or three times."""


def find_projected(step: Step, module: nn.Module | None, owner: str, can_fold: bool) -> Rule:
    """The rule of a call of one of `ATTENTIONS`.

    Args:
        step: with its values.
        module: the module in whose forward the call is.
        owner: its full name.
        can_fold: whether constants can be added to the biases.
    """
    call: dict[str, Any] = dict(zip(_POSITIONS, step.node.args, strict=False)) | dict(
        step.node.kwargs
    )
    if module is None or original_class(module) not in (nn.MultiheadAttention, ReducedAttention):
        return Opaque(FOREIGN)
    values = {name: step.value(argument) for name, argument in call.items()}
    expected = {name: full_name(owner, name) for name in _PARAMETERS}
    expected |= {
        f"out_proj_{leaf}": full_name(owner, f"out_proj.{leaf}") for leaf in ("weight", "bias")
    }
    for name, parameter in expected.items():
        value = values.get(name)
        if value is not None and (value.name != parameter or not value.follows):
            return Opaque(FOREIGN)
    if call.get("static_k") is not None or call.get("static_v") is not None:
        return Opaque(STATIC)
    found = {name: value for name, value in values.items() if value is not None}
    adds_zero = bool(call["add_zero_attn"])
    attends = step.attends or adds_zero or "bias_k" in found  # which no mask hides
    rule = ProjectedAttention(found, call["num_heads"], adds_zero, can_fold, owner, attends)
    return rule if rule.heads > 0 else Opaque("no head is left")


@dataclass(frozen=True, eq=False)
class ProjectedAttention:
    """Attention with its projections: heads go whole, with all that makes and reads them.

    Attributes:
        values: what the call reads, by the names of its arguments.
        heads: `H`.
        adds_zero: whether a key and value of zeros is added to the sequence.
        can_fold: whether constants can be added to the biases there are.
        owner: full name of the module.
        attends: whether every query has something to attend to, in any call.
    """

    values: dict[str, Value]
    heads: int
    adds_zero: bool
    can_fold: bool
    owner: str
    attends: bool

    def forward(self, step: Step) -> None:
        """A feature is constant where all heads that it reads are."""
        out, weight, bias = (
            step.outputs[0],
            self.out_weight.known.value,
            self._bias("out_proj_bias"),
        )
        constant, value = self._constants()
        found = ~((weight != 0) & ~constant).any(dim=1)
        total = weight.double() @ value + (0 if bias is None else bias)
        if bool(found.any()):
            shape = [1] * (len(out.shape) - 1) + [-1]
            out.known = Known(found.view(shape), torch.where(found, total, 0.0).view(shape))

    def backward(self, step: Step) -> None:
        """Queries and keys are needed where a head that varies is, values where any is."""
        for name, needed in self._needed(step).items():
            self.values[name].need(needed)
        for mask in self._masks():
            if bool(self._moving(step).any()):
                mask.need(~mask.needed)

    def agree(self, step: Step) -> Iterator[Value]:
        """Heads go whole; inputs go with columns that add nothing, results with their rows."""
        out, x = step.outputs[0], [self.values[name] for name in ("query", "key", "value")]
        held = [*self._masks(), *step.outputs[1:]]
        yield from stay(all_dims(*held), MIXED)
        yield from stay((place for v in (*x, out) for place in list(all_dims(v))[:-1]), MIXED)
        last = len(out.shape) - 1
        bias = self.values.get("out_proj_bias")
        rows = [(out, last), (self.out_weight, 0), *([(bias, 0)] if bias is not None else [])]
        yield from alike(rows)
        yield from self._inputs(step)
        gone = self._free(step)
        width = self.width
        for value, dim, starts in self._places():
            for start in starts:
                part = value.removed[dim][start : start + self.inner]
                gone = gone & part.view(self.heads, width).all(dim=1)
        allowed = gone.repeat_interleave(width)
        for value, dim, starts in self._places():
            if value.allow(dim, allowed.repeat(len(starts)), self.why(step)):
                yield value

    def folds(self, step: Step) -> Iterator[Fold]:
        """What constant heads add to the bias after them, and constant inputs to the one before."""
        constant, value = self._constants()
        taken = torch.where(constant & self.out_weight.removed[1], value, 0.0)
        weight = self.out_weight
        if bool(taken.any()):
            yield Fold(weight, self._node(step, "out_proj_bias"),
                       weight.known.value.double() @ taken, int((taken != 0).sum()))  # fmt: skip
        added: list[Tensor] = []
        count = 0
        for name, (own, start) in self._projections().items():
            known, found = uniform_constants(self.values[name], len(self.values[name].shape) - 1)
            taken = torch.where(known & own.removed[1], found, 0.0)
            count = max(count, int((taken != 0).sum()))
            added.append(own.known.value[start : start + self.inner].double() @ taken)
        if count:
            first, _ = self._projections()["query"]
            yield Fold(first, self._node(step, "in_proj_bias"), torch.cat(added), count)

    def write(self, program: Program, node: fx.Node) -> None:
        """Let the call and its module be ones that take the heads that are left."""
        node.target = reduced_attention_forward
        node.args = (*node.args[:3], self.width, self.kept_heads, *node.args[5:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if not k.startswith("static_")}
        program.attributes[self.owner, "__class__"] = ReducedAttention
        program.attributes[self.owner, "num_heads"] = self.kept_heads

    def why(self, step: Step) -> str:
        """Why heads stay that have zeros in them."""
        if self._reads_weights(step):
            return AVERAGED
        hidden = not self.attends and bool(replace(self, attends=True)._constants()[1].any())
        other = UNATTENDED if hidden else WIDTH
        return MASKED if self._has_mask_by_head(step) else other

    @property
    def inner(self) -> int:
        """`I`, the width of all heads."""
        return self.out_weight.shape[1]

    @property
    def width(self) -> int:
        """`D`, the width of a head."""
        return self.inner // self.heads

    @property
    def kept_heads(self) -> int:
        """How many heads stay."""
        return self.out_weight.kept(1) // self.width

    @property
    def out_weight(self) -> Value:
        """The weight from heads, `[E, I]`."""
        return self.values["out_proj_weight"]

    def weights(self) -> Iterator[tuple[Value, str | None]]:
        """The weights to heads, each with the argument it multiplies; None where all three."""
        packed = self.values.get("in_proj_weight")
        if packed is not None:
            yield packed, None
            return
        yield from ((self.values[f"{name[0]}_proj_weight"], name) for name in self._projections())

    def _projections(self) -> dict[str, tuple[Value, int]]:
        """Argument -> the weight that multiplies it, and the first of its rows there."""
        packed = self.values.get("in_proj_weight")
        if packed is not None:
            return {n: (packed, i * self.inner) for i, n in enumerate(("query", "key", "value"))}
        return {n: (self.values[f"{n[0]}_proj_weight"], 0) for n in ("query", "key", "value")}

    def _places(self) -> Iterator[_Place]:
        thrice = (0, self.inner, 2 * self.inner)
        if "in_proj_weight" in self.values:
            yield self.values["in_proj_weight"], 0, thrice
        for name in _WEIGHTS:
            if name in self.values and "in_proj_weight" not in self.values:
                yield self.values[name], 0, (0,)
        if "in_proj_bias" in self.values:
            yield self.values["in_proj_bias"], 0, thrice
        for name in ("bias_k", "bias_v"):
            if name in self.values:
                yield self.values[name], 2, (0,)
        yield self.out_weight, 1, (0,)

    def _weight(self, name: str) -> Tensor:
        """The rows of a weight that make queries, keys or values, `[I, ...]`."""
        value, start = self._projections()[name]
        return value.known.value[start : start + self.inner]

    def _bias(self, name: str) -> Tensor | None:
        value = self.values.get(name)
        return None if value is None else value.known.value.double()

    def _constants(self) -> tuple[Tensor, Tensor]:
        """Which features of heads are the same for any input, and what they are, `[I]` both."""
        x, weight = self.values["value"], self._weight("value")
        constant, value = uniform_constants(x, len(x.shape) - 1)
        found = ~((weight != 0) & ~constant).any(dim=1)
        total = weight.double() @ torch.where(constant, value, 0.0)
        bias, added = self._bias("in_proj_bias"), self._bias("bias_v")
        if bias is not None:
            total = total + bias[2 * self.inner :]
        if added is not None:
            found = found & (added.flatten() == total)
        if self.adds_zero or not self.attends:
            found = found & (total == 0)
        return found, torch.where(found, total, 0.0)

    def _read(self, step: Step) -> Tensor:
        """Which features of heads a needed result reads, `[I]`."""
        out = step.outputs[0]
        rows = any_slice(out.needed, len(out.shape) - 1, out.shape[-1])
        return ((self.out_weight.known.value != 0) & rows[:, None]).any(dim=0)

    def _moving(self, step: Step) -> Tensor:
        """Which heads are read and vary, `[H]`."""
        if self._reads_weights(step):
            return torch.ones(self.heads, dtype=torch.bool)
        constant, _ = self._constants()
        return (self._read(step) & ~constant).view(self.heads, self.width).any(dim=1)

    def _needed(self, step: Step) -> dict[str, Tensor]:
        """Argument -> which of its features make a difference, compact."""
        moving = self._moving(step).repeat_interleave(self.width)
        found: dict[str, Tensor] = {}
        for name, rows in (("query", moving), ("key", moving), ("value", self._read(step))):
            columns = ((self._weight(name) != 0) & rows[:, None]).any(dim=0)
            found[name] = columns.view([1] * (len(self.values[name].shape) - 1) + [-1])
        return found

    def _inputs(self, step: Step) -> Iterator[Value]:
        """Let inputs lose what is not needed, or can be added to the bias."""
        needed = self._needed(step)
        foldable = self.can_fold and "in_proj_bias" in self.values
        for name in self._projections():
            x = self.values[name]
            last = len(x.shape) - 1
            constant, value = uniform_constants(x, last)
            allowed = ~needed[name].flatten() | (constant & ((value == 0) | foldable))
            if x.allow(last, allowed, "they are needed"):
                yield x
        for weight, name in self.weights():
            read = [self.values[n] for n in ((name,) if name else self._projections())]
            yield from alike([(weight, 1), *((x, len(x.shape) - 1) for x in read)])

    def _free(self, step: Step) -> Tensor:
        """Which heads nothing reads, or are constants that a bias can take, `[H]`."""
        if self._reads_weights(step) or self._has_mask_by_head(step):
            return torch.zeros(self.heads, dtype=torch.bool)
        constant, value = self._constants()
        foldable = self.can_fold and "out_proj_bias" in self.values
        free = ~self._read(step) | (constant & ((value == 0) | foldable))
        return free.view(self.heads, self.width).all(dim=1)

    def _masks(self) -> list[Value]:
        return [self.values[n] for n in ("attn_mask", "key_padding_mask") if n in self.values]

    def _has_mask_by_head(self, step: Step) -> bool:
        return len(self.values["attn_mask"].shape) == 3 if "attn_mask" in self.values else False

    def _reads_weights(self, step: Step) -> bool:
        return any(bool(weights.needed.any()) for weights in step.outputs[1:])

    def _node(self, step: Step, name: str) -> fx.Node | None:
        value: Any = self.values.get(name)
        return next((node for node, own in step.values.items() if own is value), None)
