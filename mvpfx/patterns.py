"""Patterns: which overrides match which site, and which of them wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mvpfx.site import Site

REGEX = "re:"

Change = Mapping[str, Any] | None
Specificity = tuple[int, int]
"""(3, 0) a parameter, (2, 0) a module, (1, dots) the beginning of a name, (0, 0) a regex."""


def check_pattern(pattern: object) -> None:
    """Make sure that `pattern` is text, and a valid regular expression after "re:".

    Raises:
        TypeError: if it is no text.
        ValueError: if the expression is invalid.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"an override's pattern must be text; found {pattern!r}.")
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(
                f"overrides[{pattern!r}] is no valid regular expression: {error}."
            ) from None


def specificity(pattern: str, site: Site) -> Specificity | None:
    """How specific a match of `pattern` with `site` (under any of its names) is; None without one.

    >>> site = Site("encoder.0.ffn.weight", (4, 4))
    >>> [specificity(p, site) for p in ("encoder.0.ffn.weight", "encoder.0.ffn", "encoder.0")]
    [(3, 0), (2, 0), (1, 1)]
    >>> specificity("re:.*ffn", site), specificity("encoder.1", site)
    ((0, 0), None)
    """
    found = [_specificity(pattern, name) for name in (site.name, *site.aliases)]
    return max((match for match in found if match is not None), default=None)


def _specificity(pattern: str, name: str) -> Specificity | None:
    module = name.rpartition(".")[0]
    if pattern.startswith(REGEX):
        expression = re.compile(pattern.removeprefix(REGEX))
        return (0, 0) if expression.fullmatch(name) or expression.fullmatch(module) else None
    if pattern == name:
        return 3, 0
    if pattern == module:
        return 2, 0
    return (1, pattern.count(".")) if name.startswith(f"{pattern}.") else None


def merge_overrides(
    overrides: Mapping[str, Change], sites: Sequence[Site]
) -> dict[str, tuple[bool | None, dict[str, Any]]]:
    """What the overrides say of each site.

    Returns:
        Site name -> (True to prune it, False to leave it alone, None where nothing matches;
        the fields that change, merged).

    Raises:
        ValueError: if a pattern matches no site, or two equally specific ones disagree on one.
    """
    used: set[str] = set()
    merged: dict[str, tuple[bool | None, dict[str, Any]]] = {}
    for site in sites:
        wishes: dict[str, list[_Wish]] = {}
        for pattern, change in overrides.items():
            match = specificity(pattern, site)
            if match is None:
                continue
            used.add(pattern)
            for name, value in {_PRUNE: change is not None, **(change or {})}.items():
                wishes.setdefault(name, []).append((match, pattern, value))
        included = _decide(_PRUNE, wishes.pop(_PRUNE), site) if wishes else None
        names = wishes if included else {}
        merged[site.name] = included, {name: _decide(name, wishes[name], site) for name in names}
    unmatched = [pattern for pattern in overrides if pattern not in used]
    if unmatched:
        raise ValueError(_no_match(unmatched[0], sites))
    return merged


_PRUNE = "prune"
_Wish = tuple[Specificity, str, Any]


def _decide(name: str, wishes: Sequence[_Wish], site: Site) -> Any:
    """The value that the most specific pattern wants; an error where two of these disagree."""
    most = max(match for match, _, _ in wishes)
    first, *others = [(pattern, value) for match, pattern, value in wishes if match == most]
    for pattern, value in others:
        if value == first[1]:
            continue
        differ = f"{name} is {first[1]!r} in one and {value!r} in the other"
        if name == _PRUNE:
            differ = "one leaves it alone (None), the other prunes it"
        raise ValueError(
            f"overrides {first[0]!r} and {pattern!r} both match {site.name} and disagree: "
            f"{differ}. Narrow one of the two, or add a more specific override that decides."
        )
    return first[1]


def _no_match(pattern: str, sites: Sequence[Site]) -> str:
    """The message for a pattern that matches no site: which names there are, close ones first."""
    names: list[str] = []
    for site in sites:
        for name in (site.name, *site.aliases):
            parts = name.split(".")
            names += [name, *(".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))]
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(pattern.removeprefix(REGEX), names, n=3)
    some = close or [site.name for site in sites[:3]]
    listed = ", ".join(f'"{name}"' for name in some) or "none"
    word = "Close names" if close else "Sites"
    return (
        f"overrides[{pattern!r}] matches none of the {len(sites)} weights that can be pruned. "
        f"{word}: {listed}. Use the name of a parameter or module, the beginning of one up to a "
        'dot, or "re:" and a regular expression for the whole name.'
    )
