"""Insert masks: one mask a site, and one mask node before each matmul that reads the site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from mvpfx.facts import fact
from mvpfx.mask import Mask
from mvpfx.matmul import Matmul, find_matmuls, redirect
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name, parent_name
from mvpfx.swap import MASK_SUFFIX, find_mask
from mvpfx.weights import parameter_names


@dataclass(frozen=True)
class InsertMasks(Pass):
    """Make the masks that are missing, then let every matmul read its weight through them.

    Only the chain that ends in a matmul is redirected: an embedding lookup of a tied weight keeps
    the raw one. A weight used twice gets one mask node with two uses.
    """

    name: ClassVar[str] = "insert_masks"
    requires: ClassVar[tuple[str, ...]] = ("sites",)
    ensures: ClassVar[tuple[str, ...]] = ("masked",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Fill `program.modules` with masks and rewrite the graphs."""
        for name, rule in program.rules.items():
            site = program.sites[name]
            if mask_of(program, name) is None:
                weight = program.parameter(name)
                assert isinstance(weight, nn.Parameter)
                program.modules[mask_name(name)] = Mask(site, weight, rule)
                yield Decision(name, "insert mask", True, "scores added")
        for region, graph in program.graphs.items():
            for use in unmasked(program, region, graph):
                _insert(graph, use, _target(program, region, use))


@fact("masked")
def masked(program: Program) -> str | None:
    """Every matmul on a site reads it through its mask."""
    for region, graph in program.graphs.items():
        for use in unmasked(program, region, graph):
            return f"{use.node.name} in region {region!r} reads {use.weight.target} without mask"
    return None


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


def unmasked(program: Program, region: str, graph: fx.Graph) -> list[Matmul]:
    """The uses of masked parameters in one graph that read the raw parameter."""
    known = parameter_names(program.model)

    def has_mask(use: Matmul) -> bool:
        names = known[full_name(region, use.weight.target)]
        return any(mask_of(program, name) is not None for name in names)

    return [
        u
        for u in find_matmuls(graph, program.weight_shapes(region))
        if u.mask is None and has_mask(u)
    ]


def _target(program: Program, region: str, use: Matmul) -> str:
    """Where the mask is found from inside the region: at the name it is registered under, if that
    lies inside, else at the (tied) name the graph reads.
    """
    read = str(use.weight.target)
    prefix = f"{region}." if region else ""
    for name in parameter_names(program.model)[full_name(region, read)]:
        if name.startswith(prefix) and program.module(mask_name(name)) is not None:
            return mask_name(name.removeprefix(prefix))
    return mask_name(read)


def _insert(graph: fx.Graph, use: Matmul, target: str) -> None:
    mask = next((n for n in use.weight.users if n.op == "call_module" and n.target == target), None)
    if mask is None:
        with graph.inserting_after(use.weight):
            mask = graph.call_module(target, (use.weight,))
        mask.meta = dict(use.weight.meta)
    redirect(graph, use, mask)
