"""Configuration: what to prune, how far and by which rule, with exceptions by site."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from mvpfx import criteria
from mvpfx import granularity as granularities
from mvpfx import saved_schedule as schedules
from mvpfx.coupled import check_coupled
from mvpfx.patterns import check_pattern, merge_overrides
from mvpfx.rule import (
    DENSITY,
    RULE_FIELDS,
    Change,
    Rule,
    check_budget,
    check_group_density,
    check_ranked,
    checked_field,
    own_score_init,
    without_followers,
)
from mvpfx.schedule import CubicSchedule, Schedule
from mvpfx.site import Site

_UNSAID = CubicSchedule()
"""The schedule of a configuration that names none."""


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


@dataclass(frozen=True)
class PruningConfig:
    """All that `prepare` needs to know; checks itself at once and never changes.

    >>> config = PruningConfig(density=0.1, overrides={"classifier": None})
    >>> PruningConfig.from_json(config.to_json()) == config
    True

    Attributes:
        criterion: "movement", "soft_movement", "magnitude", "l0", "saliency", "ema_magnitude",
            "random", "platon" or "second_order"; each is a class in `mvpfx.criteria`.
        granularity: "element", "row", "column", the (rows, cols) of a block, "head" for what an
            attention head has of a projection, "channel" for what a hidden channel has of all
            weights that make and read it, "hybrid" for channels where there are any (the hidden
            units of an FFN) and 32 x 32 blocks elsewhere, or "N:M", such as "2:4", to keep N of
            each M weights that are neighbours along the inputs. Heads are scored where their
            outputs are read, which decides on the whole of them; channels have one score for the
            rows that make and the columns that read them.
        density: final fraction of units kept, above 0 and at most 1; N / M for "N:M".
        params: what is to be left of the model's parameters, above 0 and at most 1, in the place of
            `density`, which follows when the model is prepared: the same for all sites whose
            override names none.
        flops: the same of the FLOPs of one call with the example inputs.
        scope: "local" keeps that fraction of each weight, "global" of all weights together.
        score_init: "sensitivity" starts from the rank of what the loss would miss, measured in the
            schedule's warm-up, which small data sets need; "magnitude" from the rank of `abs(W)`;
            "zero" is the paper's, for hundreds of thousands of examples; or a number for all. None
            is "sensitivity" for movement, "magnitude" for soft_movement and l0; other scores are
            not learned.
        schedule: how density (or threshold) moves over the optimizer steps; `CubicSchedule()`, of
            20 cuts for "second_order".
        threshold: final cutoff `tau` of soft movement, in (0, 1).
        penalty_lambda: final factor of the penalty of soft movement and l0, at least 0. None steers
            it to `density`; a number is the paper's way, whose density follows from the scores.
        criterion_options: numbers of the criterion's own, by name, such as `{"beta": 0.99}` of
            "ema_magnitude"; an override that changes the criterion starts without them.
        allow_unremovable: whether heads may be pruned that `convert` could not remove: they become
            zeros and stay in their tensors. Without it `prepare` raises an error.
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
    density: float = DENSITY
    params: float | None = None
    flops: float | None = None
    scope: str = "local"
    score_init: str | float | None = None
    schedule: Schedule = _UNSAID
    threshold: float = 0.1
    penalty_lambda: float | None = None
    criterion_options: Mapping[str, float] = field(default_factory=lambda: Change({}))
    allow_unremovable: bool = False
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        for name in RULE_FIELDS:
            object.__setattr__(self, name, checked_field(name, getattr(self, name)))
        check_budget(self.params, self.flops, self.density, self.penalty_lambda)
        criteria.check_options(self.criterion, self.criterion_options)
        own_score_init(self.criterion, self.score_init)
        check_group_density(self.granularity, self.density, DENSITY)
        _check_switch(self.allow_unremovable, "allow_unremovable")
        cuts = criteria.find(self.criterion).cuts
        if self.schedule is _UNSAID and cuts is not None:
            object.__setattr__(self, "schedule", CubicSchedule(cuts=cuts))
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
            values["score_init"] = own_score_init(values["criterion"], values["score_init"])
            granularity = granularities.parse(values["granularity"])
            if not granularity.fits(site) and "granularity" not in change:
                continue
            values["granularity"] = granularity.of(site)
            values["granularity"].check(site)
            if values["granularity"].group is not None:
                values["density"] = values["granularity"].density
                check_ranked(values["criterion"], values["granularity"], site.name)
            rules[site.name] = Rule(**values)
        heads = {site.name: site.head for site in candidates if site.head is not None}
        check_coupled(rules, candidates)
        return without_followers(rules, heads)

    @property
    def couples(self) -> bool:
        """Whether any site may share its scores with others, which graphs have to show."""
        return any(granularity.channel for granularity in self._granularities())

    @property
    def prunes_heads(self) -> bool:
        """Whether any site may be pruned by heads."""
        return any(granularity.head for granularity in self._granularities())

    def _granularities(self) -> list[granularities.Granularity]:
        changes = [change for change in self.overrides.values() if change is not None]
        given = [self.granularity, *(c["granularity"] for c in changes if "granularity" in c)]
        return [granularities.parse(value) for value in given]

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


def config_of(config: object, given: Mapping[str, Any]) -> PruningConfig:
    """The configuration that `prepare` was called with, as one object or as keywords.

    Raises:
        TypeError: both were given, or something else; the text shows the right call.
    """
    if config is None:
        return _from_keywords(given)
    if isinstance(config, PruningConfig):
        if not given:
            return config
        raise TypeError(
            f"prepare was given a PruningConfig and {', '.join(given)} besides. Put all into one "
            f"of them: PruningConfig({next(iter(given))}=..., ...)."
        )
    call = "mvpfx.prepare(model, density=0.1)"
    if isinstance(config, Mapping):
        call = "mvpfx.prepare(model, **config)"
    raise TypeError(
        f"prepare needs a PruningConfig or keywords; found {config!r} ({type(config).__name__}). "
        f"Call {call}."
    )


def _from_keywords(given: Mapping[str, Any]) -> PruningConfig:
    known = [f.name for f in fields(PruningConfig)]
    for name, value in given.items():
        if name in known:
            continue
        near = get_close_matches(name, known, 1)
        remedy = f"Did you mean {near[0]}=?" if near else f"It has {', '.join(known)}."
        if name in ("sparsity", "amount", "final_sparsity"):
            kept = f"{1 - value:.4g}" if isinstance(value, float) and 0 <= value < 1 else "..."
            remedy = f"density is the fraction that is kept: mvpfx.prepare(model, density={kept})."
        raise TypeError(f"a configuration has no field {name!r}. {remedy}")
    return PruningConfig(**given)


def _check_switch(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; found {value!r}.")


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a Schedule, such as CubicSchedule(); found {schedule!r}."
        )


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
            values = {name: checked_field(name, value) for name, value in change.items()}
            if "density" in values and "granularity" in values:
                check_group_density(values["granularity"], values["density"])
            checked[pattern] = values
        except (TypeError, ValueError) as error:
            raise type(error)(f"overrides[{pattern!r}]: {error}") from None
    return Overrides(checked)
