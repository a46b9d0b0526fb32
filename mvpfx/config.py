"""Configuration: what to prune, how far and by which rule, with exceptions by site."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mvpfx import criteria
from mvpfx import granularity as granularities
from mvpfx import schedule as schedules
from mvpfx.checks import as_density, as_number
from mvpfx.granularity import Granularity
from mvpfx.patterns import check_pattern, merge_overrides
from mvpfx.schedule import CubicSchedule, Schedule
from mvpfx.site import Site

SCOPES = ("local", "global")
SCORE_INITS = ("magnitude", "zero")


class Overrides(Mapping[str, "Mapping[str, Any] | None"]):
    """Exceptions by pattern, read-only and independent of what they were made from."""

    def __init__(self, entries: Mapping[str, Mapping[str, Any] | None] | None = None) -> None:
        self._entries = {
            pattern: None if change is None else Change(change)
            for pattern, change in (entries or {}).items()
        }

    def __getitem__(self, pattern: str) -> Mapping[str, Any] | None:
        return self._entries[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


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
        score_init: first scores: "magnitude", "zero" or a number.
        threshold: final cutoff of `sigmoid(scores)`, for criteria that have one.
        penalty_lambda: final factor of the penalty, for criteria that have one.
        criterion_options: numbers of the criterion's own.
    """

    criterion: str = "movement"
    granularity: Granularity = field(default_factory=Granularity)
    density: float = 0.15
    scope: str = "local"
    score_init: str | float = "magnitude"
    threshold: float = 0.1
    penalty_lambda: float = 100.0
    criterion_options: Mapping[str, float] = field(default_factory=lambda: Change({}))


RULE_FIELDS = tuple(f.name for f in fields(Rule))


@dataclass(frozen=True)
class PruningConfig:
    """All that `prepare` needs to know; checks itself at once and never changes.

    >>> config = PruningConfig(density=0.1, overrides={"classifier": None})
    >>> PruningConfig.from_json(config.to_json()) == config
    True

    Attributes:
        criterion: "movement", "soft_movement", "magnitude", "l0", "saliency", "ema_magnitude",
            "random" or "platon"; each is a class in `mvpfx.criteria`.
        granularity: "element", "row", "column", or the (rows, cols) of a block.
        density: final fraction of units kept, above 0 and at most 1.
        scope: "local" keeps that fraction of each weight, "global" of all weights together.
        score_init: "magnitude" starts from the rank of `abs(W)`, which small data sets need;
            "zero" is the paper's, for hundreds of thousands of examples; or a number for all. Only
            for scores that are learned: of movement, soft_movement and l0.
        schedule: how density (or threshold) moves over the optimizer steps.
        threshold: final cutoff `tau` of soft movement, in (0, 1).
        penalty_lambda: final factor of the penalty of soft movement and l0, at least 0.
        criterion_options: numbers of the criterion's own, by name, such as `{"beta": 0.99}` of
            "ema_magnitude"; an override that changes the criterion starts without them.
        overrides: pattern -> changed fields, or None to leave a site alone. A pattern is a
            parameter's or a module's name, the beginning of one up to a dot, or "re:" and a
            regular expression for the whole of either. The most specific pattern wins, field by
            field, in this order. Fields on a site that is not pruned by default add it.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is unknown or out of range.
    """

    criterion: str = "movement"
    granularity: str | tuple[int, int] = "element"
    density: float = 0.15
    scope: str = "local"
    score_init: str | float = "magnitude"
    schedule: Schedule = field(default_factory=CubicSchedule)
    threshold: float = 0.1
    penalty_lambda: float = 100.0
    criterion_options: Mapping[str, float] = field(default_factory=lambda: Change({}))
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        for name in RULE_FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        criteria.check_options(self.criterion, self.criterion_options)
        _check_schedule(self.schedule)
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))

    def rules(self, candidates: Sequence[Site], defaults: Collection[str]) -> dict[str, Rule]:
        """The rule of each site that is to be pruned, in the order of `candidates`.

        Args:
            candidates: all sites that could be pruned.
            defaults: names of those that are unless an override says otherwise.

        Raises:
            ValueError: if a pattern matches no candidate, two equally specific patterns disagree on
                a site, or the blocks of a site do not tile it.
        """
        changes = merge_overrides(self.overrides, candidates)
        base = {name: getattr(self, name) for name in RULE_FIELDS}
        rules: dict[str, Rule] = {}
        for site in candidates:
            included, change = changes[site.name]
            if included is False or (included is None and site.name not in defaults):
                continue
            values = {**base, **change}
            if values["criterion"] != self.criterion and "criterion_options" not in change:
                values["criterion_options"] = Change({})
            criteria.check_options(values["criterion"], values["criterion_options"])
            values["granularity"] = granularities.parse(values["granularity"])
            values["granularity"].check(site)
            rules[site.name] = Rule(**values)
        return rules

    def to_json(self) -> str:
        """The configuration as JSON text; `from_json` reads it back."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["schedule"] = self.schedule.to_dict()
        return json.dumps(values, indent=2, default=dict)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """The way back of `to_json`; fields that are missing have their defaults.

        Raises:
            TypeError: if the text is no JSON object, or a value has the wrong type.
            ValueError: if it is no JSON, or a field or value is unknown.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(f"a configuration must be a JSON object; found {values!r}.")
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"a configuration has no field {unknown[0]!r}. It has {', '.join(known)}."
            )
        if "schedule" in values:
            values["schedule"] = schedules.from_dict(values["schedule"])
        return cls(**values)


def _checked(name: str, value: Any) -> Any:
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
        return value if value in SCORE_INITS else _constant_scores(value)
    number = as_number(value, name)
    if name == "threshold" and not 0 < number < 1:
        raise ValueError(
            "threshold must be above 0 and below 1: it is the cutoff of sigmoid(scores); "
            f"found {value!r}."
        )
    if name == "penalty_lambda" and number < 0:
        raise ValueError(f"penalty_lambda must be at least 0; found {value!r}.")
    return number


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


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a Schedule, such as CubicSchedule(); found {schedule!r}."
        )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    choice = " or ".join(f'"{word}"' for word in known)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {choice}; found {value!r}.")
    if value not in known:
        raise ValueError(f'{name} "{value}" is unknown. Use {choice}.')
    return value


def _checked_overrides(overrides: object) -> Overrides:
    """The overrides with their values checked; which sites they match shows in `rules`."""
    if not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides must map patterns to changed fields or None; found {overrides!r}."
        )
    checked: dict[str, Mapping[str, Any] | None] = {}
    for pattern, change in overrides.items():
        check_pattern(pattern)
        if change is None:
            checked[pattern] = None
            continue
        if not isinstance(change, Mapping):
            raise TypeError(
                f"overrides[{pattern!r}] must be None, to leave the site alone, or the fields that "
                f"change; found {change!r}."
            )
        unknown = [name for name in change if name not in RULE_FIELDS]
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}] has no field {unknown[0]!r}. "
                f"It may change {', '.join(RULE_FIELDS)}."
            )
        try:
            checked[pattern] = {name: _checked(name, value) for name, value in change.items()}
        except (TypeError, ValueError) as error:
            raise type(error)(f"overrides[{pattern!r}]: {error}") from None
    return Overrides(checked)
