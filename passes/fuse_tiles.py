"""Fuse tiles: let what lies between and around sparse matmuls be computed in tiles with them."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx, nn

from mvpfx.kernels.chain import Chain
from mvpfx.kernels.plan import Draft, Value, fold, groups_of, offsets_of, passing, slots_of
from mvpfx.kernels.spare import Spare
from mvpfx.kernels.step import Part, Place, Step
from mvpfx.kernels.tiling import Tiling
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program
from mvpfx.variant import generate

SLOTS = 100
"""Of the workspace, for each chain of a graph."""


@dataclass(frozen=True)
class FuseTiles(Pass):
    """Turn sparse layers on native kernels, and what can be computed with them, into chains.

    The graphs' targets are those of a model whose sparse layers are in place.
    """

    name: ClassVar[str] = "fuse_tiles"
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def apply(self, program: Program) -> Iterator[Decision]:
        """Rewrite each graph that has such layers."""
        for region, graph in program.graphs.items():
            module = program.model.get_submodule(region)
            tiling = Tiling(module, graph)
            obstacle = tiling.obstacle()
            drafts = [] if obstacle else fold(tiling.drafts())
            if not any(draft.kind == "multiply" for draft in drafts):
                reason = obstacle or "no layer on native kernels"
                yield Decision(region, "fuse", False, reason)
                continue
            writer = _Writer(module, drafts)
            program.graphs[region] = writer.write(graph)
            steps = sum(draft.kind != "node" for draft in drafts)
            reason = f"{steps} steps in chains: {writer.chains}"
            yield Decision(region, "fuse", True, reason)


class _Writer:
    """Writes drafts as a graph: chains, and nodes as they were."""

    def __init__(self, module: nn.Module, drafts: Sequence[Draft]) -> None:
        self._module = module
        self.groups = groups_of(drafts)
        self.graph = fx.Graph()
        self.chains = 0
        self._tensors: dict[fx.Node, fx.Node] = {}
        self._tiles: dict[int, fx.Node] = {}
        self._held: dict[str, fx.Node] = {}
        self._users: dict[int, set[int]] = {}
        for index, group in enumerate(self.groups):
            for draft in group:
                for value in draft.values():
                    self._users.setdefault(value.number, set()).add(index)

    def write(self, graph: fx.Graph) -> fx.Graph:
        """The new graph; `graph` is left as it is."""
        for index, group in enumerate(self.groups):
            if group[0].kind == "node":
                self._copy(group[0])
            else:
                self._chain(index, group)
        (output,) = graph.find_nodes(op="output")
        self.graph.output(fx.map_arg(output.args[0], self._tensors.__getitem__))
        return self.graph

    def _copy(self, draft: Draft) -> None:
        node = draft.node
        assert node is not None
        self._tensors[node] = self.graph.node_copy(node, self._tensors.__getitem__)
        self._tensors[node].meta = dict(node.meta)

    def _held_node(self, target: str) -> fx.Node:
        """What a module or a parameter of the region is read by."""
        if target not in self._held:
            self._held[target] = self.graph.get_attr(target)
        return self._held[target]

    def _chain(self, index: int, group: Sequence[Draft]) -> None:
        self.chains += 1
        builder = _ChainBuilder()
        made = {draft.makes.number: draft.makes.width for draft in group if draft.makes}
        shared = [n for n in made if self._users.get(n, set()) - {index}]
        outside = set(shared) | passing(group)
        offsets = offsets_of(group, made.keys() - outside, ())
        slots = slots_of(group, outside, shared, SLOTS * self.chains)
        for draft in group:
            for value in draft.values():
                if value.number not in made:
                    builder.tiles(value.number, self._tiles[value.number])
            if draft.makes is not None:
                number = draft.makes.number
                builder.make(draft.makes, offsets.get(number), slots.get(number))
            sources = [self._source(draft, source) for source in draft.sources()]
            builder.step(draft, sources)
        left = [draft.node for draft in group if draft.kind == "leave"]
        spare, read = self._spare([node for node in left if node is not None], len(shared))
        chain = builder.chain([builder.numbers[n] for n in shared], spare)
        call = self.graph.call_function(chain, (*builder.arguments, *read))
        for position, number in enumerate(shared):
            self._tiles[number] = self.graph.call_function(operator.getitem, (call, position))
        for position, node in enumerate(left, len(shared)):
            assert node is not None
            self._tensors[node] = self.graph.call_function(operator.getitem, (call, position))
            self._tensors[node].meta = dict(node.meta)

    def _spare(self, left: Sequence[fx.Node], handed_on: int) -> tuple[Spare, list[fx.Node]]:
        """What makes the tensors that leave a chain of those that are there before it, and these.

        Whatever lies between was found to have no effect but its value, or it would not be tiled.
        """
        graph, nodes, read = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
        order = _needed(left, self._tensors)
        for node in (n for n in order if n in self._tensors):
            nodes[node] = graph.placeholder(node.name)
            read.append(self._tensors[node])
        for node in (n for n in order if n not in self._tensors):
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
            nodes[node].meta = dict(node.meta)
        graph.output(tuple(nodes[node] for node in left))
        return Spare(partial(generate, self._module, graph), len(read), handed_on), read

    def _source(self, draft: Draft, source: Any) -> fx.Node | None:
        if isinstance(source, fx.Node):
            return self._tensors[source]
        return None if source is None else self._held_node(source)


def _needed(wanted: Sequence[fx.Node], known: Container[fx.Node]) -> list[fx.Node]:
    """The nodes that `wanted` are computed from, in order, back to those that are known."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += () if node in known else node.all_input_nodes
    return [node for node in wanted[0].graph.nodes if node in found] if wanted else []


class _ChainBuilder:
    """Puts together the arguments, places and steps of one chain."""

    def __init__(self) -> None:
        self.arguments: list[fx.Node] = []
        self.numbers: dict[int, int] = {}
        self._places: list[Place] = []
        self._steps: list[Step] = []

    def tiles(self, number: int, node: fx.Node) -> None:
        """A value that was made before."""
        if number not in self.numbers:
            self.numbers[number] = len(self._places)
            self._places.append(Place(0, argument=self._argument(node)))

    def make(self, value: Value, offset: int | None, slot: int | None) -> None:
        """A value that is made here: in the tile's own memory, or in the workspace."""
        self.numbers[value.number] = len(self._places)
        self._places.append(Place(value.width, offset=offset, slot=slot))

    def step(self, draft: Draft, sources: Sequence[fx.Node | None]) -> None:
        """One step, whose tensors and layers are `sources`."""
        made, options = draft.makes, draft.options
        x, factor, addend = (*draft.reads, None, None, None)[:3]
        width = 1 if made is None or x is None else x.width // options.get("heads", 1)
        scale = options.get("scale")
        self._steps.append(
            Step(
                draft.kind,
                self._part(x),
                self._part(made),
                tuple(-1 if s is None else self._argument(s) for s in sources),
                options.get("activation"),
                self._part(factor or draft.factor),
                self._part(addend or draft.addend),
                options.get("epsilon", 0.0),
                options.get("centred", True),
                options.get("heads", 1),
                options.get("groups", 1),
                width**-0.5 if scale is None else scale,
                options.get("causal", False),
                options.get("beside", False),
                options.get("shift", 0.0),
            )
        )

    def chain(self, results: Sequence[int], spare: Spare) -> Chain:
        """The chain, which returns these values in tiles."""
        return Chain(self._steps, self._places, results, spare)

    def _argument(self, node: fx.Node) -> int:
        if node not in self.arguments:
            self.arguments.append(node)
        return self.arguments.index(node)

    def _part(self, value: Value | None) -> Part | None:
        if value is None:
            return None
        return Part(self.numbers[value.number], value.first, value.width)
