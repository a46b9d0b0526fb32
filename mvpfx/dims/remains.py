"""What is dead and stays: rows and columns of zeros that could not go, and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mvpfx.dims.contraction import Contraction
from mvpfx.dims.convolution import Convolution
from mvpfx.dims.flow import Flow
from mvpfx.dims.projected_attention import ProjectedAttention
from mvpfx.dims.rule import Opaque, Step
from mvpfx.dims.stack import Choice, GroupedProduct
from mvpfx.dims.value import Value
from mvpfx.program import Program
from mvpfx.weights import layer_sites

ELSEWHERE = "something else reads them"
NO_GRAPH = "no graph shows how it is used"
ROUTED = "the router sends tokens to them"
STACKED = "experts are stored in one tensor, and others need them"


def find_remains(program: Program, flows: list[Flow]) -> Iterator[tuple[str, str]]:
    """(weight, reason) for each weight that keeps rows or columns of zeros.

    Args:
        program: after the removal.
        flows: of all regions.
    """
    said: set[str] = set()
    for flow in flows:
        for name, reason in _in_region(flow):
            if name not in said and reason:
                yield name, reason
            said.add(name)
    opaque = {name: rule.reason for flow in flows for name, rule in _opaque_reads(flow)}
    for site in layer_sites(program.model):
        value = program.parameter(site.name)
        if site.name in said or value is None or value.dim() != len(site.shape):
            continue
        why = opaque.get(site.name, NO_GRAPH)
        if site.parts > 1:
            text = stack_text(value.detach(), why)
            if text:
                yield site.name, text
            continue
        dims = ((site.out_dim, "rows"), (1 - site.out_dim, "columns"))
        texts = [_text(zeros(value, dim), word, why) for dim, word in dims]
        if any(texts):
            yield site.name, "; ".join(filter(None, texts))


def _in_region(flow: Flow) -> Iterator[tuple[str, str]]:
    """(weight, reason or nothing) for each weight of a known matmul."""
    for step, rule in flow.steps:
        if isinstance(rule, ProjectedAttention):
            yield from _in_attention(step, rule)
        if isinstance(rule, (GroupedProduct, Choice)):
            yield from _in_stack(flow, step)
        if not isinstance(rule, (Contraction, Convolution)):
            continue
        x, weight, _ = rule.parts(step)
        if len(weight.shape) < 2 or weight.name not in flow.parameters:
            continue
        rows, columns = rule.weight_dims
        places = (
            (rows, "rows", step.outputs[0], step.features),
            (columns, "columns", x, rule.input_dim),
        )
        texts = [
            _text(_left(weight, dim), word, _why(weight, dim, other, place))
            for dim, word, other, place in places
        ]
        yield weight.name, "; ".join(filter(None, texts))


def _in_attention(step: Step, rule: ProjectedAttention) -> Iterator[tuple[str, str]]:
    """(weight, reason or nothing) for the weights to heads, and from them."""
    why, out = rule.why(step), step.outputs[0]
    for weight, name in rule.weights():
        x = rule.values[name or "query"]
        reasons = (weight.fixed[0] or why, _why(weight, 1, x, len(x.shape) - 1))
        yield weight.name, _both(weight, reasons)
    weight = rule.out_weight
    reasons = (_why(weight, 0, out, len(out.shape) - 1), weight.fixed[1] or why)
    yield weight.name, _both(weight, reasons)


def _in_stack(flow: Flow, step: Step) -> Iterator[tuple[str, str]]:
    """(stack of experts, reason or nothing) for what a step reads, as it is or turned."""
    for node in step.node.all_input_nodes:
        while node.op == "call_method" and node.target == "transpose":
            node = node.all_input_nodes[0]
        weight = flow.values.get(node)
        if not isinstance(weight, Value) or not weight.follows or len(weight.shape) != 3:
            continue
        tensor = flow.program.parameter(weight.name)
        assert tensor is not None
        yield weight.name, stack_text(tensor.detach(), next(filter(None, weight.fixed), STACKED))


def stack_text(stack: Tensor, reason: str) -> str:
    """What single experts of a stack `[X, ..., ...]` have no use for, and why it stays."""
    live = (stack != 0).flatten(1).any(dim=1)
    dead = sum(int((~(stack[live] != 0).any(dim=dim)).sum()) for dim in (1, 2))
    gone = int((~live).sum())
    texts = [f"{gone} of {len(live)} experts are zero, but {ROUTED}"] if gone else []
    texts += [f"{dead} slices of single experts are zero, but {reason}"] if dead else []
    return "; ".join(texts)


def _both(weight: Value, reasons: tuple[str, str]) -> str:
    """What is left of the rows and columns of a weight `[out, in]`, and why."""
    words = ((0, "rows", reasons[0]), (1, "columns", reasons[1]))
    texts = [_text(_left(weight, dim), word, why) for dim, word, why in words]
    return "; ".join(filter(None, texts))


def _opaque_reads(flow: Flow) -> Iterator[tuple[str, Opaque]]:
    for step, rule in flow.steps:
        if isinstance(rule, Opaque):
            yield from ((value.name, rule) for value in step.inputs)


def _why(weight: Value, dim: int, other: Value, place: int) -> str:
    return weight.fixed[dim] or other.fixed[place] or other.reasons[place] or ELSEWHERE


def _text(dead: Tensor, word: str, reason: str) -> str:
    count = int(dead.sum())
    return f"{count} of {len(dead)} {word} are zero, but {reason}" if count else ""


def _left(weight: Value, dim: int) -> Tensor:
    """Which slices of a weight along `dim` stay, and are zero wherever it stays."""
    if 0 in weight.kept_shape:
        return torch.zeros(weight.shape[dim], dtype=torch.bool)
    value = weight.known.value.masked_fill(weight.elements(), 0)
    return zeros(value, dim) & ~weight.removed[dim]


def zeros(value: Tensor, dim: int) -> Tensor:
    """Which slices along `dim` are all zero."""
    if not value.numel():
        return torch.zeros(value.shape[dim], dtype=torch.bool)
    return ~(value != 0).any(dim=[d for d in range(value.dim()) if d != dim])
