"""Coupling: which weights make, and which read, the same hidden channels.

A channel that no weight reads need not be made. So one column of every weight is taken to be zero,
and what the analysis of `convert` would then remove shows which rows of other weights go with it.
Values of weights play no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvpfx.channel_unit import ChannelUnit
from mvpfx.dims.contraction import Contraction
from mvpfx.dims.convolution import Convolution
from mvpfx.dims.flow import Flow
from mvpfx.dims.grouped_convolution import GroupedConvolution
from mvpfx.dims.rule import Rule, Step, all_dims
from mvpfx.dims.value import Value
from mvpfx.layer import Obstacle, find_obstacles
from mvpfx.program import Program, full_name, graph_text
from mvpfx.site import Site

Place = tuple[int, int]
"""A dimension of a value: its identity, and which dimension."""


@dataclass(frozen=True)
class Sighting:
    """What goes with one column of a weight: the weights that read it too, rows of others."""

    readers: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]


def find_channel_units(program: Program, sites: Sequence[Site]) -> dict[str, ChannelUnit]:
    """Site name -> what a hidden channel has of it, for those that share their channels.

    Each site is in one group at most: the first, in the order in which the model reads channels.
    Projections from attention heads are left to heads.

    Args:
        program: with graphs.
        sites: that may be coupled.
    """
    alike: dict[str, dict[str, ChannelUnit]] = {}
    found: dict[str, ChannelUnit] = {}
    obstacle = find_obstacles(program)
    for region in program.graphs:
        inside = _sites_read(program, region, sites)
        key = _looks(program, region, inside, obstacle)
        if key not in alike:
            alike[key] = _in_region(program, region, inside, obstacle)
        for name, unit in alike[key].items():
            group = replace(unit, group=inside[unit.group].name)
            found.setdefault(inside[name].name, group)
    return found


def _sites_read(program: Program, region: str, sites: Sequence[Site]) -> dict[str, Site]:
    """The sites that a region reads, by the targets of its graph."""
    known = {name: site for site in sites for name in (site.name, *site.aliases)}
    targets = [str(node.target) for node in program.graphs[region].find_nodes(op="get_attr")]
    return {t: known[full_name(region, t)] for t in targets if full_name(region, t) in known}


def _looks(program: Program, region: str, inside: dict[str, Site], obstacle: Obstacle) -> str:
    """A text that is equal for regions that are coupled alike."""
    sites = [(t, s.shape, s.out_dim, s.parts, s.head is None) for t, s in inside.items()]
    fixed = [obstacle(site.name) is None for site in inside.values()]
    return f"{sites} {fixed}\n{graph_text(program.graphs[region])}"


def _in_region(
    program: Program, region: str, inside: dict[str, Site], obstacle: Obstacle
) -> dict[str, ChannelUnit]:
    units: dict[str, ChannelUnit] = {}
    alone: list[dict[str, ChannelUnit]] = []
    parts = [0.0, 0.25, 0.75, 1.0]
    sightings = [_look(program, region, inside, obstacle, part) for part in parts]
    for reader, first in sightings[0].items():
        seen = [sighting.get(reader) for sighting in sightings]
        channels = inside[reader].shape[_input_dim(inside[reader])]
        group = {
            name: ChannelUnit(reader, None, 1, _columns(inside[name]))
            for name in first.readers
            if inside[name].shape[_input_dim(inside[name])] == channels
        }
        for maker in first.rows:
            rows = [sighting.rows.get(maker, ()) if sighting else () for sighting in seen]
            columns = [_column(inside[reader], part) for part in parts]
            outputs = inside[maker].shape[inside[maker].out_dim]
            shape = _spread(rows, columns, outputs)
            if shape is not None and shape[0] * shape[1] * channels == outputs:
                group[maker] = ChannelUnit(reader, shape[1], shape[0], None)
        free = {name: unit for name, unit in group.items() if name not in units}
        if reader in free and any(not unit.reads for unit in free.values()):
            units |= free
        elif reader in free and first.rows.keys() - group:
            alone.append(free)
    # A maker with other rows besides, as that of a projection split into unequal parts, has no
    # score for each channel. Its rows are removed all the same where nothing reads them.
    for group in alone:
        if not group.keys() & units.keys():
            units |= group
    return units


def _columns(site: Site) -> int:
    """Inputs of one channel in a weight that reads channels: more than one in a convolution."""
    inputs = site.shape[_input_dim(site)]
    outputs = site.shape[site.out_dim]
    return math.prod(site.shape) // (inputs * outputs)


def _input_dim(site: Site) -> int:
    return 1 - site.out_dim


def _column(site: Site, part: float) -> int:
    return round(part * (site.shape[_input_dim(site)] - 1))


def _look(
    program: Program, region: str, inside: dict[str, Site], obstacle: Obstacle, part: float
) -> dict[str, Sighting]:
    """What goes with one column of each weight, at this part of its inputs."""
    known = {full_name(region, target): target for target in inside}
    zeroed: dict[str, Tensor | None] = {}
    for target, site in inside.items():
        if site.parts == 1 and site.shape[_input_dim(site)] > 1:
            weight = torch.ones(site.shape)
            weight.select(_input_dim(site), _column(site, part)).zero_()
            zeroed[full_name(region, target)] = weight
    trial = replace(program, parameters={**program.parameters, **zeroed})
    flow = Flow(trial, region, obstacle)
    flow.solve()
    together = _components(flow)
    found: dict[str, Sighting] = {}
    for value, target in _weights(flow, known):
        site = inside[target]
        place = (id(value), _input_dim(site))
        gone = value.removed[_input_dim(site)].nonzero().flatten().tolist()
        if gone != [_column(site, part)] or place not in together or site.head is not None:
            continue
        component = together[place]
        readers, rows = [], dict[str, tuple[int, ...]]()
        for other, name in _weights(flow, known):
            dims = _input_dim(inside[name]), inside[name].out_dim
            if (id(other), dims[0]) in component:
                readers.append(name)
            if (id(other), dims[1]) in component:
                rows[name] = tuple(other.removed[dims[1]].nonzero().flatten().tolist())
        found[target] = Sighting(tuple(readers), rows)
    return found


def _weights(flow: Flow, known: dict[str, str]) -> Iterator[tuple[Value, str]]:
    return ((value, known[name]) for name, value in flow.parameters.items() if name in known)


def _components(flow: Flow) -> dict[Place, set[Place]]:
    """Dimensions of which something goes, with all those it goes together with."""
    component: dict[Place, set[Place]] = {}
    for step, rule in flow.steps:
        for linked in _links(step, rule):
            going = [(id(v), dim) for v, dim in linked if bool(v.removed[dim].any())]
            merged = set(going).union(*(component.get(place, set()) for place in going))
            component |= dict.fromkeys(merged, merged)
    return component


def _links(step: Step, rule: Rule) -> Iterator[list[tuple[Value, int]]]:
    """Dimensions that lose channels together in one step."""
    if isinstance(rule, Contraction):
        x, y, bias = rule.parts(step)
        words = [(x, rule.x), (y, rule.y), (step.outputs[0], rule.out)]
        if bias is not None:
            words.append((bias, rule.out[-len(bias.shape) :]))
        for letter in rule.x + rule.y:
            yield [(value, word.index(letter)) for value, word in words if letter in word]
    elif isinstance(rule, Convolution) and not isinstance(rule, GroupedConvolution):
        x, weight, bias = rule.parts(step)
        rows, columns = rule.weight_dims
        yield [(x, rule.input_dim), (weight, columns)]
        yield [(weight, rows), (step.outputs[0], step.features)] + ([(bias, 0)] if bias else [])
    else:
        yield list(all_dims(*step.inputs, *step.outputs))


def _spread(rows: list[tuple[int, ...]], columns: list[int], size: int) -> tuple[int, int] | None:
    """(copies, rows that are neighbours) of each channel along an output dimension of `size`.

    None where the rows seen do not lie so.

    Args:
        rows: that went with each of the columns.
        columns: which these were.
        size: of the dimension.
    """
    count = len(rows[0])
    if not count or size % count:
        return None
    near = next((i for i, row in enumerate(rows[0]) if row != i), count)
    if not near or count % near:
        return None
    copies, channels = count // near, size // count
    for found, column in zip(rows, columns, strict=True):
        places = [(copy * channels + column) * near for copy in range(copies)]
        if found != tuple(place + i for place in places for i in range(near)):
            return None
    return copies, near
