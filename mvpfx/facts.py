"""Facts: what a pass may require of a program, and what it must leave true.

A fact is a name and a predicate over the program itself, so the runner can check it on the result
of a pass instead of believing the pass.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from mvpfx.native_linear import NativeLinear
from mvpfx.program import Program, full_name
from mvpfx.storage import SparseLinear

Fact = Callable[[Program], str | None]
"""Returns None where the fact holds, else the reason it does not."""

FACTS: dict[str, Fact] = {}
"""Fact name -> predicate; filled by `fact`."""

REDUCED = "reduced"
"""The storage of a dense weight that became smaller."""
SPARSE = ("csr", "bsr", "native")
"""The storages that a `SparseLinear` keeps."""
NATIVE_DENSE = "native_dense"
"""The storage that a `NativeLinear` keeps."""
NATIVE = ("native", NATIVE_DENSE)
"""The storages that native kernels compute with."""
MODULES: dict[str, type[nn.Module]] = {
    **dict.fromkeys(SPARSE, SparseLinear),
    NATIVE_DENSE: NativeLinear,
}
"""Storage -> the module that keeps it; others stay in the module they are in."""


def fact(name: str) -> Callable[[Fact], Fact]:
    """Register the decorated predicate as the meaning of fact `name`."""

    def register(predicate: Fact) -> Fact:
        FACTS[name] = predicate
        return predicate

    return register


def find_fact(name: str) -> Fact:
    """Return the predicate of fact `name`.

    Raises:
        ValueError: there is no such fact.
    """
    if name not in FACTS:
        raise ValueError(f"unknown fact {name!r}; known facts: {', '.join(sorted(FACTS))}")
    return FACTS[name]


def is_mask_node(node: fx.Node) -> bool:
    """Whether a node applies the mask of the one parameter it reads."""
    if node.op != "call_module" or not str(node.target).endswith("_mask"):
        return False
    read = node.args[0] if len(node.args) == 1 else None
    return isinstance(read, fx.Node) and read.op == "get_attr"


@fact("masks_folded")
def masks_folded(program: Program) -> str | None:
    """No graph masks a weight, but for sites that are on record as unfolded."""
    for region, node in program.nodes():
        if is_mask_node(node):
            name = full_name(region, node.all_input_nodes[0].target)
            site = program.site_of(name)
            if (site.name if site else name) not in program.unfolded:
                return f"{name} still goes through {node.target}"
    return None


@fact("shapes_agree")
def shapes_agree(program: Program) -> str | None:
    """Every weight has the shape its module's attributes say."""
    for (module_name, attribute), size in program.attributes.items():
        weight = program.parameter(full_name(module_name, "weight"))
        dim = {"out_features": 0, "in_features": 1, "nx": 0, "nf": 1}.get(attribute)
        if dim is not None and weight is not None and weight.shape[dim] != size:
            return f"{module_name}.{attribute} is {size}, its weight {tuple(weight.shape)}"
    return None


@fact("storages_chosen")
def storages_chosen(program: Program) -> str | None:
    """Every site has a storage."""
    missing = [name for name in program.sites if name not in program.storages]
    return f"{missing[0]} has no storage" if missing else None


@fact("layouts_chosen")
def layouts_chosen(program: Program) -> str | None:
    """Every site that moves to another module has an output layout."""
    for name, storage in program.storages.items():
        if storage in MODULES and name not in program.layouts:
            return f"{name} is {storage} and has no output layout"
    return None


@fact("lowered")
def lowered(program: Program) -> str | None:
    """Every site is in the module that keeps its storage."""
    for name, storage in program.storages.items():
        if storage in MODULES:
            module = program.module(program.sites[name].module_name)
            if not isinstance(module, MODULES[storage]):
                return f"{name} is {storage}, its module {type(module).__name__}"
    return None
