"""Matmuls in a graph: which nodes multiply by a weight, and how the weight reaches them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Size, Tensor, fx

from mvpfx.matmul_table import ATTENTIONS, LISTED_WEIGHTS, SEVERAL_WEIGHTS, SIGNATURES, Signature
from mvpfx.torch_private import size_hint

ParameterShape = Callable[[str], "tuple[int, ...] | Size | None"]
"""The shape of the parameter a get_attr target names, None where it is no parameter."""


@dataclass
class Matmul:
    """One use of one weight.

    Attributes:
        node: the call that multiplies.
        weight: the get_attr node of the parameter.
        operand: what `node` reads: `weight` itself, its mask node, or the end of `chain`.
        chain: parameter-only nodes between weight (or mask) and `node`, in order.
        mask: the call_module node of the mask, None where there is none.
        input: the activations; None where the call has more than one (attention).
        bias: the get_attr node of the bias, None where there is none.
        out_dim: the dimension of the stored weight that runs along output features.
        parts: number of matrices the stored weight stacks along its first dimension.
        kind: "linear", "addmm", "matmul", "einsum" (inner and tensordot too), "convolution",
            "attention", "grouped", "recurrent".
    """

    node: fx.Node
    weight: fx.Node
    operand: fx.Node
    kind: str
    out_dim: int
    input: fx.Node | None = None
    bias: fx.Node | None = None
    mask: fx.Node | None = None
    chain: list[fx.Node] = field(default_factory=list[fx.Node])
    parts: int = 1


_CONTRACTIONS = (torch.einsum, torch.inner, torch.tensordot)
_CHOOSING = (operator.getitem, "__getitem__", "index_select", torch.index_select)
_SAME = ("to", "contiguous", "float", "half", "bfloat16", "type", "type_as")
_SWAPS = ("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute")


def find_matmuls(graph: fx.Graph, shape_of: ParameterShape) -> list[Matmul]:
    """Every use of a weight of two or more dimensions by a matmul, in graph order."""
    return [found for node in graph.nodes for found in _uses(node, shape_of)]


def _uses(node: fx.Node, shape_of: ParameterShape) -> Iterator[Matmul]:
    if node.op not in ("call_function", "call_method"):
        return
    if node.target in SEVERAL_WEIGHTS or node.target in LISTED_WEIGHTS:
        yield from _several_uses(node, shape_of)
        return
    if node.target in _CONTRACTIONS:
        yield from _contraction_uses(node, shape_of)
        return
    signature = SIGNATURES.get(node.target)
    if signature is None:
        return
    operands = _operands(node, signature)
    for place, other, out_dim in (
        (signature.right, signature.left, signature.out_dim_right),
        (signature.left, signature.right, signature.out_dim_left),
    ):
        found = _weight(operands.get(place), shape_of)
        if found is None:
            continue
        weight, mask, chain = found
        bias = operands.get(signature.bias) if signature.bias is not None else None
        stored_dim, parts = _stored_dim(out_dim, weight, chain, shape_of), 1
        shape = shape_of(str(weight.target)) or ()
        if len(shape) == 3 and signature.kind != "convolution" and all(map(_keeps_parts, chain)):
            outputs_last = out_dim ^ (sum(swaps(link) for link in chain) % 2)
            stored_dim, parts = 1 + outputs_last, shape[0]
        yield Matmul(
            node=node,
            weight=weight,
            operand=operands[place],
            kind=signature.kind,
            out_dim=stored_dim,
            parts=parts,
            input=operands.get(other),
            bias=bias if bias is not None and bias.op == "get_attr" else None,
            mask=mask,
            chain=chain,
        )


def _operands(node: fx.Node, signature: Signature) -> dict[int, fx.Node]:
    given: dict[int, Any] = dict(enumerate(node.args))
    for name, position in signature.keywords:
        if name in node.kwargs:
            given[position] = node.kwargs[name]
    return {position: value for position, value in given.items() if isinstance(value, fx.Node)}


def _several_uses(node: fx.Node, shape_of: ParameterShape) -> Iterator[Matmul]:
    """The weights of a call that multiplies by more than one: attention, a recurrent layer."""
    kind = "attention" if node.target in ATTENTIONS else "recurrent"
    operands: list[Any] = []
    for position, name in SEVERAL_WEIGHTS.get(node.target, ()):
        given = 0 <= position < len(node.args)
        operands.append(node.args[position] if given else node.kwargs.get(name))
    for argument in node.args if node.target in LISTED_WEIGHTS else ():
        operands += argument if isinstance(argument, (list, tuple)) else ()
    for operand in operands:
        found = _weight(operand, shape_of)
        if found is not None:
            weight, mask, chain = found
            operand = cast("fx.Node", operand)
            yield Matmul(node, weight, operand, kind, 0, None, None, mask, chain)


def _contraction_uses(node: fx.Node, shape_of: ParameterShape) -> Iterator[Matmul]:
    operands = list(node.args[1:] if node.target is torch.einsum else node.args[:2])
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    for place, operand in enumerate(operands):
        found = _weight(operand, shape_of)
        if found is None:
            continue
        weight, mask, chain = found
        kept = _kept_dims(node, place, len(shape_of(str(weight.target)) or ()))
        others = [o for o in operands if isinstance(o, fx.Node) and o is not operand]
        yield Matmul(
            node=node,
            weight=weight,
            operand=cast("fx.Node", operand),
            kind="einsum",
            out_dim=_stored_dim(kept[-1] if kept else 0, weight, chain, shape_of),
            input=others[0] if len(others) == 1 else None,
            mask=mask,
            chain=chain,
        )


def _kept_dims(node: fx.Node, place: int, rank: int) -> list[int]:
    """Dimensions of a contraction's operand that its output has too."""
    if node.target is torch.inner:
        return list(range(rank - 1))
    if node.target is torch.tensordot:
        dims: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", 2)
        if isinstance(dims, int):
            dims = (range(rank - dims, rank), range(dims))
        summed = {dim % rank for dim in dims[place]}
        return [dim for dim in range(rank) if dim not in summed]
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow:  # letters that occur once are kept
        output = [letter for letter in inputs if inputs.count(letter) == 1]
    return [dim for dim, letter in enumerate(inputs.split(",")[place]) if letter in output]


def _weight(
    operand: Any, shape_of: ParameterShape
) -> tuple[fx.Node, fx.Node | None, list[fx.Node]] | None:
    """(parameter, mask node, chain) where `operand` is a function of one weight alone, or some of
    the matrices it stacks, chosen by an index.
    """
    chain: list[fx.Node] = []
    node, mask, chosen = operand, None, False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            rank = len(shape_of(str(node.target)) or ())
            fits = rank == 3 if chosen else rank >= 2
            return (node, mask, chain[::-1]) if fits else None
        if node.op == "call_module" and str(node.target).endswith("_mask"):
            mask = node
        elif node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
            chain.append(node)
        elif node.target in _CHOOSING and isinstance(node.args[0], fx.Node):
            chain.append(node)
            chosen = True
        else:
            return None
        node = node.all_input_nodes[0]
    return None


def _stored_dim(dim: int, weight: fx.Node, chain: list[fx.Node], shape_of: ParameterShape) -> int:
    """The stored dimension that is `dim` after the chain; exact for matrices, else 0."""
    shape = shape_of(str(weight.target))
    assert shape is not None
    if len(shape) != 2:
        return dim if not chain and dim < len(shape) and len(shape) > 3 else 0
    turns = sum(swaps(node) for node in chain)
    return dim if turns % 2 == 0 else 1 - dim


def _keeps_parts(node: fx.Node) -> bool:
    """Whether a node leaves the matrices of a stack what they are, or chooses among them."""
    return swaps(node) or node.target in (*_CHOOSING, "select", "unbind", *_SAME)


def swaps(node: fx.Node) -> bool:
    """Whether a node exchanges the two dimensions of a matrix."""
    target: Any = node.target
    if target is getattr:
        target = node.args[1]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _SWAPS


def token_count(use: Matmul) -> int | None:
    """Rows of activations that reached the matmul in the recorded call; None where unknown."""
    value = use.input.meta.get("val") if use.input is not None else None
    if not isinstance(value, Tensor) or use.kind == "convolution":
        return None
    return math.prod(size_hint(size) for size in value.shape[:-1])
