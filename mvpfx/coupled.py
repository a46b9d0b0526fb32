"""Coupled sites: weights that make and read the same hidden channels share one score for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from mvpfx import criteria

if TYPE_CHECKING:
    from mvpfx.rule import Rule
    from mvpfx.site import Site

COUPLED = 'granularity "channel" and "hybrid" score the hidden channels that weights share'
"""Why graphs are needed."""


def groups(rules: Mapping[str, Rule], sites: Iterable[Site]) -> list[list[Site]]:
    """The sites that share their scores, one list a group; first of each the one that holds them.

    That is the first weight to read the channels, or to make them where none is pruned that reads
    them.

    Args:
        rules: by the names of their sites.
        sites: all that may have a rule.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.name in rules and rules[site.name].granularity.channel and site.channel is not None:
            found.setdefault(site.channel.group, []).append(site)
    return [
        sorted(group, key=lambda site: site.channel is not None and not site.channel.reads)
        for group in found.values()
    ]


def check_coupled(rules: Mapping[str, Rule], sites: Iterable[Site]) -> None:
    """Make sure that sites which share their scores are pruned alike, by what can be shared.

    Raises:
        ValueError: if not; the message names the sites.
    """
    for leader, *followers in groups(rules, sites):
        rule = rules[leader.name]
        if not criteria.find(rule.criterion).couples:
            raise ValueError(
                f'{leader.name}: criterion "{rule.criterion}" scores each weight by itself, and '
                'granularity "channel" all weights of a channel together. Use another criterion, '
                'such as "movement", or granularity "column" there.'
            )
        for site in followers:
            for name in (f.name for f in fields(rule) if f.name != "granularity"):
                own, other = getattr(rules[site.name], name), getattr(rule, name)
                if dict(own) != dict(other) if name == "criterion_options" else own != other:
                    raise ValueError(
                        f"{site.name} has {name}={own!r} and {leader.name} {name}={other!r}, but "
                        "they share the scores of their hidden channels. Let overrides change "
                        f'both, or give one of them another granularity, such as "row".'
                    )
