"""Rules: how one site is pruned, and the checks of what may stand in a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mvpfx import criteria
from mvpfx import granularity as granularities
from mvpfx.checks import as_density, as_number
from mvpfx.granularity import Granularity
from mvpfx.head_unit import HeadUnit
from mvpfx.score_init import MAGNITUDE, SENSITIVITY, ZERO

SCOPES = ("local", "global")
DENSITY = 0.15
"""Of a configuration that says nothing of it."""
SCORE_INITS = (SENSITIVITY, MAGNITUDE, ZERO)


class Change(Mapping[str, Any]):
    """The fields that one override changes, read-only."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class Rule:
    """How one site is pruned: the configuration, with the overrides that match the site put in.

    Attributes:
        criterion: name of the rule that produces the scores.
        granularity: shape of the unit that one score governs.
        density: fraction of units kept at the end.
        scope: "local" ranks within the site, "global" across sites.
        score_init: first scores: "sensitivity", "magnitude", "zero" or a number.
        threshold: final cutoff of `sigmoid(scores)`, for criteria that have one.
        penalty_lambda: final factor of the penalty, for criteria that have one; None steers it.
        criterion_options: numbers of the criterion's own.
    """

    criterion: str = "movement"
    granularity: Granularity = field(default_factory=Granularity)
    density: float = DENSITY
    scope: str = "local"
    score_init: str | float = "magnitude"
    threshold: float = 0.1
    penalty_lambda: float | None = None
    criterion_options: Mapping[str, float] = field(default_factory=lambda: Change({}))


RULE_FIELDS = tuple(f.name for f in fields(Rule))


def checked_field(name: str, value: Any) -> Any:
    """A rule's field as it is stored, or an error."""
    if name == "criterion":
        return criteria.find(value).name
    if name == "granularity":
        parsed = granularities.parse(value)
        if isinstance(value, str):
            return value
        return (parsed.rows, parsed.cols)
    if name == "density":
        return as_density(value)
    if name == "scope":
        return _one_of("scope", value, SCOPES)
    if name == "criterion_options":
        return _checked_options(value)
    if name == "score_init":
        return value if value is None or value in SCORE_INITS else _constant_scores(value)
    if name == "penalty_lambda" and value is None:
        return None
    number = as_number(value, name)
    if name == "threshold" and not 0 < number < 1:
        raise ValueError(
            "threshold must be above 0 and below 1: it is the cutoff of sigmoid(scores); "
            f"found {value!r}."
        )
    if name == "penalty_lambda" and number < 0:
        raise ValueError(f"penalty_lambda must be at least 0; found {value!r}.")
    return number


def check_budget(
    params: float | None, flops: float | None, density: float, penalty_lambda: float | None
) -> None:
    """Make sure that one thing at most says how far to prune.

    Raises:
        TypeError: if a budget is no number.
        ValueError: if it is out of range, or something else says how far to prune.
    """
    budgets = {k: v for k, v in {"params": params, "flops": flops}.items() if v is not None}
    for name, value in budgets.items():
        if not 0 < as_number(value, name) <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1; found {value!r}.")
    given = [f"{name}={value:g}" for name, value in budgets.items()]
    given += [f"density={density:g}"] if density != DENSITY else []
    given += [] if penalty_lambda is None else [f"penalty_lambda={penalty_lambda:g}"]
    if budgets and len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} both say how far to prune. Use one of params, flops and "
            "density, and no penalty_lambda with params or flops."
        )


def check_group_density(granularity: Any, density: float, unsaid: float | None = None) -> None:
    """Make sure that no density is asked for that "N:M" does not give."""
    given = granularities.parse(granularity).density
    if given is not None and density not in (given, unsaid):
        raise ValueError(
            f'granularity "{granularity}" keeps {given:g} of the weights; found '
            f"density={density:g}. Leave density out."
        )


def without_followers(rules: dict[str, Rule], heads: Mapping[str, HeadUnit]) -> dict[str, Rule]:
    """The rules without those of projections to heads that are scored where they are read from.

    One score decides on a head: where the projection from its heads is pruned by heads, those to
    them are left alone, and what a dead head had of them goes when the model is converted.

    Args:
        rules: by the names of their sites.
        heads: what a head has of each site that is a projection.
    """
    scored = {name: heads[name] for name, rule in rules.items() if rule.granularity.head}
    leading = {scored_attention(rules[name], unit) for name, unit in scored.items()}
    following = {n for n, u in scored.items() if u.cols is None and u.attention in leading}
    return {name: rule for name, rule in rules.items() if name not in following}


def scored_attention(rule: Rule, unit: HeadUnit | None) -> str | None:
    """The attention whose heads a rule scores where their outputs are read; None for all else."""
    if unit is None or unit.cols is None or not rule.granularity.head:
        return None
    return unit.attention


def own_score_init(criterion: str, score_init: str | float | None) -> str | float:
    """First scores as asked for, or the criterion's own where nothing is said.

    Raises:
        ValueError: if the criterion learns its scores, and cannot start so.
    """
    known = criteria.find(criterion)
    if score_init is None:
        return known.score_inits[0]
    if known.learned and isinstance(score_init, str) and score_init not in known.score_inits:
        choice = ", ".join(f'"{word}"' for word in known.score_inits)
        raise ValueError(
            f'criterion "{criterion}" cannot start from score_init="{score_init}". Use {choice} '
            "or a number."
        )
    return score_init


def check_ranked(criterion: str, granularity: Granularity, name: str) -> None:
    """Make sure that a criterion ranks, where N of M are to be kept."""
    if not criteria.find(criterion).pooled:
        raise ValueError(
            f'{name}: criterion "{criterion}" keeps what its scores say, and granularity '
            f'"{granularity}" a number of each group. Use a criterion that ranks, such as '
            '"movement".'
        )


def _checked_options(value: object) -> Change:
    """Options as they are stored; whether a criterion has them shows when it is known."""
    if not isinstance(value, Mapping):
        raise TypeError(f"criterion_options must map names to numbers; found {value!r}.")
    return Change({str(k): as_number(v, f"criterion_options[{k!r}]") for k, v in value.items()})


def _constant_scores(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return as_number(value, "score_init")
    choice = ", ".join(f'"{word}"' for word in SCORE_INITS)
    found = f"{value!r} ({type(value).__name__})"
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"score_init must be {choice} or a number; found {found}.")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    choice = " or ".join(f'"{word}"' for word in known)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {choice}; found {value!r}.")
    if value not in known:
        raise ValueError(f'{name} "{value}" is unknown. Use {choice}.')
    return value
