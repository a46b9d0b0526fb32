"""A plan: what of a graph is computed in tiles, as a list of steps over numbered values.

Folding puts activations, products and sums behind the matmul that makes what they read, or behind
one another, and joins matmuls that read the same value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

FOLDING = ("multiply", "combine")
"""Steps that end in `activation(x) * factor + addend`."""


@dataclass(frozen=True)
class Value:
    """Tiled activations: features `first` to `first + width` of a numbered value."""

    number: int
    first: int
    width: int


@dataclass
class Draft:
    """One step before it is placed; see `mvpfx.kernels.chain.Step`.

    Attributes:
        kind: enter, leave, multiply, normalize, combine, attend or rotate; "node" for a node that
            is computed as it was.
        reads: what it reads: `x`; query, key and value to attend; `x`, cosines and sines to rotate.
        makes: the value it makes; None to leave.
        front: the leading sizes of the activations, as text.
        node: that is computed as it was; to enter, the node whose tensor enters; to leave, the one
            whose tensor it gives.
        layers: targets of the sparse layers.
        factor, addend: values.
        options: activation, epsilon, heads and so on.
    """

    kind: str
    reads: tuple[Value, ...]
    makes: Value | None
    front: str
    node: fx.Node | None = None
    layers: tuple[str, ...] = ()
    factor: Value | None = None
    addend: Value | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def values(self) -> tuple[Value, ...]:
        """All values that it reads."""
        return (*self.reads, *(v for v in (self.factor, self.addend) if v is not None))

    def sources(self) -> tuple[Any, ...]:
        """What else the step reads: nodes, and targets of layers and weights."""
        if self.kind == "enter":
            return (self.node,)
        if self.kind == "normalize":
            return self.options.get("weight"), self.options.get("bias")
        if self.kind == "attend":
            return (self.options.get("mask"),)
        return self.layers


def fold(drafts: list[Draft]) -> list[Draft]:
    """The same in fewer steps."""
    return _join(_fold_all(drafts))


def _fold_all(drafts: list[Draft]) -> list[Draft]:
    folded: list[Draft] = []
    uses = Counter(value.number for draft in drafts for value in draft.values())
    for draft in drafts:
        merged = _folded(draft, folded, uses) if draft.kind == "combine" else None
        folded.append(draft if merged is None else merged)
    return folded


def _folded(draft: Draft, before: list[Draft], uses: Counter[int]) -> Draft | None:
    """A step before that does this one too; it is taken out of those before."""
    for value in draft.values():
        maker = next((d for d in before if d.makes == value and d.kind in FOLDING), None)
        if maker is None or uses[value.number] != 1:
            continue
        others = [other for other in draft.values() if other is not value]
        merged = _with(maker, draft, others)
        if merged is not None:
            before.remove(maker)
            return merged
    return None


def _with(maker: Draft, draft: Draft, others: list[Value]) -> Draft | None:
    activation = draft.options.get("activation")
    if activation is not None:
        if maker.options.get("activation") or maker.factor or maker.addend:
            return None
        return replace(
            maker, makes=draft.makes, options={**maker.options, "activation": activation}
        )
    (other,) = others
    if maker.addend is not None:
        return None
    if draft.factor is None:
        return replace(maker, makes=draft.makes, addend=other)
    return None if maker.factor else replace(maker, makes=draft.makes, factor=other)


def _join(drafts: list[Draft]) -> list[Draft]:
    """Multiplications of one value with nothing behind them become one, the first."""
    joined: list[Draft] = []
    parts: dict[int, Value] = {}
    groups: dict[Value, list[Draft]] = {}
    for draft in drafts:
        plain = not (draft.factor or draft.addend or draft.options.get("activation"))
        if draft.kind == "multiply" and plain:
            groups.setdefault(draft.reads[0], []).append(draft)
    lead: dict[int, list[Draft]] = {id(g[0]): g for g in groups.values() if len(g) > 1}
    rest = {id(draft) for group in lead.values() for draft in group[1:]}
    for draft in drafts:
        if id(draft) in rest:
            continue
        group = lead.get(id(draft))
        if group is None:
            joined.append(draft)
            continue
        made = [d.makes for d in group if d.makes is not None]
        whole = Value(made[0].number, 0, sum(value.width for value in made))
        first = 0
        for value in made:
            parts[value.number] = Value(whole.number, first, value.width)
            first += value.width
        layers = tuple(layer for d in group for layer in d.layers)
        joined.append(replace(draft, makes=whole, layers=layers))
    return [_renamed(draft, parts) for draft in joined]


def _renamed(draft: Draft, parts: dict[int, Value]) -> Draft:
    def part(value: Value | None) -> Value | None:
        known = parts.get(value.number) if value is not None else None
        if known is None or value is None:
            return value
        return Value(known.number, known.first + value.first, value.width)

    reads = tuple(new for value in draft.reads if (new := part(value)) is not None)
    return replace(draft, reads=reads, factor=part(draft.factor), addend=part(draft.addend))


def groups_of(drafts: Sequence[Draft]) -> list[list[Draft]]:
    """The drafts in groups that run one after the other: a node, or a chain.

    A chain is as long as can be: it ends where a node needs what leaves it.
    """
    groups: list[list[Draft]] = []
    chain: list[Draft] = []

    def close() -> None:
        if chain:
            groups.append(list(chain))
            chain.clear()

    for draft in drafts:
        left = {d.node for d in chain if d.kind == "leave"}
        if draft.kind == "node":
            assert draft.node is not None
            if left.intersection(draft.node.all_input_nodes):
                close()
            groups.append([draft])
            continue
        if chain and (chain[0].front != draft.front or left.intersection(draft.sources())):
            close()
        chain.append(draft)
    close()
    return groups


def passing(drafts: Sequence[Draft]) -> set[int]:
    """The values made here that are read across an attention, which takes all tiles at once."""
    phase: dict[int, int] = {}
    found: set[int] = set()
    now = 0
    for draft in drafts:
        attends = draft.kind == "attend"
        now += attends
        found |= {v.number for v in draft.values() if attends or phase.get(v.number) != now}
        if draft.makes is not None:
            phase[draft.makes.number] = now
            found |= {draft.makes.number} if attends else set()
        now += attends
    return found & phase.keys()


def offsets_of(
    drafts: Sequence[Draft], numbers: Collection[int], kept: Collection[int]
) -> dict[int, int]:
    """Where some values lie beside one another, in features; those that are not needed at the same
    time share their room.

    Args:
        drafts: of one chain.
        numbers: of the values, made by these drafts.
        kept: those that are needed afterwards.
    """
    last = {v.number: at for at, draft in enumerate(drafts) for v in draft.values()}
    offsets: dict[int, int] = {}
    held: dict[int, tuple[int, int]] = {}
    for at, draft in enumerate(drafts):
        if draft.makes is not None and draft.makes.number in numbers:
            # What this step reads is held still: its result must lie elsewhere.
            number, width = draft.makes.number, draft.makes.width
            start = 0
            for low, high in sorted(held.values()):
                if start + width <= low:
                    break
                start = max(start, high)
            offsets[number] = start
            held[number] = (start, start + width)
        for number in [n for n in held if n not in kept and last.get(n, at) <= at]:
            del held[number]
    return offsets


def slots_of(
    drafts: Sequence[Draft], numbers: Collection[int], kept: Collection[int], first: int
) -> dict[int, int]:
    """The same for values that lie in the workspace: slots, from `first` on.

    Only values of one width share a slot. A tile goes through the steps before the next does, so
    the next one's part of a value must not lie where this one's part of another value is put.
    """
    widths = {d.makes.number: d.makes.width for d in drafts if d.makes is not None}
    slots: dict[int, int] = {}
    for width in sorted({widths[number] for number in numbers}):
        alike = [number for number in numbers if widths[number] == width]
        after = 1 + max(slots.values(), default=first - 1)
        offsets = offsets_of(drafts, alike, kept)
        slots |= {number: after + offset // width for number, offset in offsets.items()}
    return slots
