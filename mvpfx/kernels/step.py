"""Steps of a chain, and where its values lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Neighbouring features of a value of the chain."""

    value: int
    first: int
    width: int


@dataclass(frozen=True)
class Step:
    """One step: `output = activation(W x + b) * factor + addend`, or another kind.

    Attributes:
        kind: "enter" makes tiles of a tensor, "leave" a tensor of tiles, "multiply" multiplies with
            sparse weights, "normalize" is layer norm or RMS norm, "combine" goes element by
            element, "attend" is attention: `x` has queries, `factor` keys and `addend` values,
            "rotate" turns the halves of each head's features by tables: `factor` has cosines and
            `addend` sines of one head.
        x: what it reads; None to enter.
        out: the value it makes; None to leave.
        sources: positions among the call's arguments: of the tensor to enter, of the sparse layers
            (more than one read the same `x` and lie one below the other), or of the norm's weight
            and bias, of the attention's mask; -1 where there is none.
        activation, factor, addend: what multiply and combine do besides.
        epsilon, centred: of a norm; RMS norm is not centred.
        shift: what is added to a norm's weight.
        heads, groups: of an attention: heads, and keys and values that neighbouring heads share; of
            a norm heads, each of which is normalized by itself.
        scale, causal: of its scores, and whether a token sees only itself and those before it.
        beside: of what enters: it may be one sequence for all, and does not tell their number.
    """

    kind: str
    x: Part | None
    out: Part | None
    sources: tuple[int, ...] = ()
    activation: str | None = None
    factor: Part | None = None
    addend: Part | None = None
    epsilon: float = 0.0
    centred: bool = True
    heads: int = 1
    groups: int = 1
    scale: float = 1.0
    causal: bool = False
    beside: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a value of a chain lies.

    Attributes:
        features: of the value.
        offset: in the tile's own memory, in features; None for one that lives on.
        argument: position among the call's arguments, of tiles that were there before.
        slot: in the workspace, of a value that is handed on in tiles.
    """

    features: int
    offset: int | None = None
    argument: int | None = None
    slot: int | None = None
