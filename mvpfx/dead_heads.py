"""What a model would be without all heads but one: a trial before any training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mvpfx.pipeline import Decision
from mvpfx.program import Program, graph_text
from mvpfx.rule import Rule
from mvpfx.site import Site

ZEROS = "are zero, but "
"""What stands before the reason in a decision on units that stay."""


def head_sites(program: Program) -> list[Site]:
    """The sites that are scored by heads where their outputs are read."""
    return [
        site
        for name, site in program.sites.items()
        if _by_head(program.rules[name]) and site.head is not None and site.head.cols is not None
    ]


def without_heads(program: Program, sites: list[Site]) -> Program:
    """The program with all heads but the first as zeros in `sites`, and one region of each kind.

    With shared keys and values any smaller number might be one that no group can spare.
    """
    parameters = dict(program.parameters)
    for site in sites:
        assert site.head is not None and site.head.cols is not None
        weight = torch.ones(site.shape)
        inputs = 1 - site.out_dim
        weight.narrow(inputs, site.head.cols, site.shape[inputs] - site.head.cols).zero_()
        parameters[site.name] = weight
    kinds = {graph_text(graph): region for region, graph in reversed(program.graphs.items())}
    graphs = {name: graph for name, graph in program.graphs.items() if name in kinds.values()}
    return replace(program, parameters=parameters, graphs=graphs)


def unremoved(program: Program, sites: list[Site], decisions: Iterator[Decision]) -> dict[str, str]:
    """Site -> why its heads stay, for the sites in the program's regions that keep all.

    Args:
        program: the trial, shrunk.
        sites: that lost heads.
        decisions: of shrinking.
    """
    said = {d.site: d.reason.partition(ZEROS)[2] for d in decisions if not d.applied}
    found: dict[str, str] = {}
    for site in sites:
        weight = program.parameter(site.name)
        inside = any(site.name.startswith(f"{name}.") or not name for name in program.graphs)
        if inside and weight is not None and tuple(weight.shape) == site.shape:
            found[site.name] = said.get(site.name) or "it is not known how it is used"
    return found


def refusal(reasons: dict[str, str]) -> str:
    """The error's text."""
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    first = next(iter(reasons)).removesuffix(".weight")
    return (
        f'granularity "head": convert could not remove the dead heads of\n{lines}\n(one layer of '
        'each kind is listed). Use another granularity there, such as "column", leave them out, '
        f'overrides={{"{first}": None}}, or keep dead heads as zeros: allow_unremovable=True.'
    )


def _by_head(rule: Rule) -> bool:
    return rule.granularity.head
