"""Remove dead channels and dead attention heads, exactly.

A channel is dead where it is a constant (folded into the next bias), or where nothing needs it.
Both the row that makes it and the column that reads it go, and what lies between follows: norms,
views, splits, head counts. A branch all of which is dead costs nothing: its hidden dimension
becomes empty, where its forward runs that way; else one index stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from mvpfx.checks import as_count
from mvpfx.dims.attention import Attention
from mvpfx.dims.experts import align_experts
from mvpfx.dims.flow import Flow, folds_of
from mvpfx.dims.follow import find_attributes
from mvpfx.dims.projected_attention import ProjectedAttention
from mvpfx.dims.proof import find_difference
from mvpfx.dims.reading import Reading
from mvpfx.dims.remains import find_remains
from mvpfx.dims.rewrite import make_writable, rewrite
from mvpfx.layer import find_obstacles
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, copy_graph, full_name

CHANNELS = "remove dead channels"
HEADS = "remove dead heads"
EXPERTS = "order units of experts"


@dataclass(frozen=True)
class ShrinkDims(Pass):
    """Make tensors between matmuls smaller, where that changes no result.

    Attributes:
        multiple_of: what sizes are rounded up to a multiple of, by keeping some dead channels.
    """

    name: ClassVar[str] = "shrink_dims"
    requires: ClassVar[tuple[str, ...]] = ("masks_folded",)
    ensures: ClassVar[tuple[str, ...]] = ("masks_folded", "shapes_agree")
    multiple_of: int = 1

    def __post_init__(self) -> None:
        as_count(self.multiple_of, "multiple_of")

    def apply(self, program: Program) -> Iterator[Decision]:
        """Shrink each region, then say what was left in it and why."""
        obstacle = find_obstacles(program)
        for region in program.graphs:
            for name, reason in align_experts(program, Reading(program, region, obstacle)):
                yield Decision(name, EXPERTS, True, reason)
        flows = [Flow(program, region, obstacle) for region in program.graphs]
        for flow in flows:
            flow.solve()
            shrink(program, flow, self.multiple_of)
            yield from removals(flow)
        for name, reason in find_remains(program, flows):
            yield Decision(name, CHANNELS, False, reason)


def shrink(program: Program, flow: Flow, multiple: int) -> None:
    """Write what may go into the program, less what the region's forward would not follow."""
    while flow.removes:
        arguments = _settled(flow, multiple)
        trial = replace(
            program,
            graphs={flow.region: copy_graph(program.graphs[flow.region])},
            parameters=dict(program.parameters),
            attributes=dict(program.attributes),
        )
        rewrite(trial, flow, arguments)
        trial.attributes |= find_attributes(program, flow, arguments)
        difference = find_difference(trial, flow.region)
        if difference is None:
            program.parameters, program.attributes = trial.parameters, trial.attributes
            program.graphs[flow.region] = trial.graphs[flow.region]
            return
        if not flow.keep_one(flow.all_values(), difference[0]):
            _block(flow, arguments, *difference)


def _settled(flow: Flow, multiple: int) -> dict[fx.Node, tuple[object, ...]]:
    """Round sizes up and take back what cannot be written, until neither changes anything."""
    while True:
        size = flow.size
        flow.round_up(multiple)
        arguments = make_writable(flow)
        if flow.size == size:
            return arguments


def _block(
    flow: Flow, arguments: dict[fx.Node, tuple[object, ...]], reason: str, node: fx.Node | None
) -> None:
    """Leave alone what the region's forward does not follow: as little as helps."""
    steps = [step for step, _ in flow.steps]
    name, module = (node.name, node.meta.get("module", "")) if node is not None else ("", None)
    at_node = [step for step in steps if step.node.name == name]
    in_module = [step for step in steps if step.node.meta.get("module", "") == module]
    written = [step for step in steps if step.node in arguments]
    before = flow.size
    for step in at_node:
        step.whole_groups = True
    flow.settle(at_node)
    for blocked in (at_node, in_module, written, steps):
        if flow.size == before:
            flow.block(blocked, reason)


def removals(flow: Flow) -> Iterator[Decision]:
    """One decision for each weight that became smaller, and for each attention."""
    folded: dict[str, int] = {}
    for _, fold in folds_of(flow):
        folded[fold.weight.name] = fold.count
    for name, value in flow.parameters.items():
        if value.kept_shape == value.shape or len(value.shape) < 2:
            continue
        sizes = " x ".join(map(str, value.shape)), " x ".join(map(str, value.kept_shape))
        reason = f"{sizes[0]} -> {sizes[1]}"
        if name in folded:
            reason += f", {folded[name]} constants folded into the bias"
        yield Decision(name, CHANNELS, True, reason)
    for step, rule in flow.steps:
        heads = kept = 0
        if isinstance(rule, Attention):
            out = step.outputs[0]
            heads, kept = out.shape[rule.out_heads], out.kept(rule.out_heads)
        elif isinstance(rule, ProjectedAttention):
            heads, kept = rule.heads, rule.kept_heads
        if heads != kept:
            site = full_name(flow.region, step.node.meta.get("module", "")).rstrip(".")
            returned = len(step.outputs) > 1 or step.node.kwargs.get("need_weights") is True
            reason = f"{heads} -> {kept} heads"
            if returned:
                reason += "; returned attention probabilities lose these heads too"
            yield Decision(site, HEADS, True, reason)
