"""Insert masks: one mask a site, and one mask node before all that computes with the site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from mvpfx.coupled import groups
from mvpfx.facts import fact, is_mask_node
from mvpfx.following_mask import FollowingMask
from mvpfx.mask import Mask
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name, parent_name
from mvpfx.rule import Rule
from mvpfx.site import Site
from mvpfx.swap import MASK_SUFFIX, find_mask
from mvpfx.weights import parameter_names

Read = tuple[fx.Node, list[fx.Node]]
"""The node that reads a parameter, and those that use what it reads."""

_LOOKUPS = (F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag)


@dataclass(frozen=True)
class InsertMasks(Pass):
    """Make the masks that are missing, then let every matmul read its weight through them.

    So does all else that computes with the weight, as the norm that DoRA divides by, for a forward
    that runs without graph reads it masked too. An embedding lookup of a tied weight keeps the raw
    one. A weight used twice gets one mask node with two uses.
    """

    name: ClassVar[str] = "insert_masks"
    requires: ClassVar[tuple[str, ...]] = ("sites",)
    ensures: ClassVar[tuple[str, ...]] = ("masked",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Fill `program.modules` with masks and rewrite the graphs."""
        new = {name: r for name, r in program.rules.items() if mask_of(program, name) is None}
        followers_of: dict[str, list[Mask]] = {}
        following: dict[str, FollowingMask] = {}
        added = dict.fromkeys(new, "scores added")
        for leader, *followers in groups(new, program.sites.values()):
            for site in followers:
                following[site.name] = FollowingMask(*_pruned(program, site.name))
                added[site.name] = f"scored with {leader.name}, channel by channel"
            followers_of[leader.name] = [following[site.name] for site in followers]
        for name, why in added.items():
            mask = following.get(name)
            if mask is None:
                mask = Mask(*_pruned(program, name), followers_of.get(name, []))
            program.modules[mask_name(name)] = mask
            yield Decision(name, "insert mask", True, why)
        for region, graph in program.graphs.items():
            for read in list(unmasked(program, region, graph)):
                _insert(graph, read, _target(program, region, str(read[0].target)))


@fact("masked")
def masked(program: Program) -> str | None:
    """Whatever computes with a site reads it through its mask."""
    for region, graph in program.graphs.items():
        for weight, users in unmasked(program, region, graph):
            return f"{users[0].name} in region {region!r} reads {weight.target} without mask"
    return None


def _pruned(program: Program, name: str) -> tuple[Site, nn.Parameter, Rule]:
    """What a mask is made of."""
    weight = program.parameter(name)
    assert isinstance(weight, nn.Parameter)
    return program.sites[name], weight, program.rules[name]


def mask_name(parameter_name: str) -> str:
    """The module name of a parameter's mask.

    >>> mask_name("encoder.dense.weight")
    'encoder.dense.weight_mask'
    """
    return f"{parameter_name}{MASK_SUFFIX}"


def mask_of(program: Program, parameter_name: str) -> nn.Module | None:
    """The mask of a parameter in the program or already in the model."""
    made = program.modules.get(mask_name(parameter_name))
    if made is not None:
        return made
    owner = program.module(parent_name(parameter_name))
    return find_mask(owner, parameter_name.rpartition(".")[2]) if owner is not None else None


def unmasked(program: Program, region: str, graph: fx.Graph) -> Iterator[Read]:
    """The reads of masked parameters in one graph that see the raw parameter, with the nodes that
    do. Looking rows up, as an embedding does, is the one use that stays raw.
    """
    known = parameter_names(program.model)
    for node in graph.find_nodes(op="get_attr"):
        names = known.get(full_name(region, node.target), ())
        if any(mask_of(program, name) is not None for name in names):
            users = [user for user in node.users if not (is_mask_node(user) or _looks_up(user))]
            if users:
                yield node, users


def _looks_up(user: fx.Node) -> bool:
    """Whether a parameter is read by `user` only to look rows up, directly or in another form."""
    if user.target in _LOOKUPS:
        return True
    form = user.op in ("call_function", "call_method") and len(user.all_input_nodes) == 1
    return form and bool(user.users) and all(_looks_up(later) for later in user.users)


def _target(program: Program, region: str, read: str) -> str:
    """Where the mask is found from inside the region: at the name it is registered under, if that
    lies inside, else at the (tied) name the graph reads.
    """
    prefix = f"{region}." if region else ""
    for name in parameter_names(program.model)[full_name(region, read)]:
        if name.startswith(prefix) and program.module(mask_name(name)) is not None:
            return mask_name(name.removeprefix(prefix))
    return mask_name(read)


def _insert(graph: fx.Graph, read: Read, target: str) -> None:
    weight, users = read
    mask = next((n for n in weight.users if n.op == "call_module" and n.target == target), None)
    if mask is None:
        with graph.inserting_after(weight):
            mask = graph.call_module(target, (weight,))
        mask.meta = dict(weight.meta)
    for user in users:
        user.replace_input_with(weight, mask)
