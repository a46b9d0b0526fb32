"""Schedules as plain data: the inverse of `Schedule.to_dict`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mvpfx.cut_schedule import OneShotSchedule, StepSchedule
from mvpfx.schedule import (
    ConstantSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
)

_OURS = (
    CubicSchedule,
    LinearSchedule,
    ExponentialSchedule,
    StepSchedule,
    OneShotSchedule,
    ConstantSchedule,
)


def _schedules() -> dict[str, Any]:
    """All schedules by name: ours first, then every class derived from `Schedule` with a name.

    Of two classes of the same name and module, as a notebook makes them, the later one counts.
    """
    found: dict[str, Any] = {kind.name: kind for kind in _OURS}
    waiting: list[type] = [Schedule]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            name = vars(kind).get("name")
            if isinstance(name, str) and found.get(name) not in _OURS:
                found[name] = kind
    return found


def check_readable(schedule: Schedule) -> None:
    """Make sure that a checkpoint of a run on this schedule could be read again.

    Raises:
        ValueError: if not; the text says what the class lacks.
    """
    kind, lacks = type(schedule), ""
    known = {ours.name: ours for ours in _OURS}
    if not isinstance(vars(kind).get("name"), str):
        lacks = "has no name of its own"
    elif known.get(kind.name, kind) is not kind:
        lacks = f"has the name of {known[kind.name].__name__}"
    elif not is_dataclass(schedule):
        lacks = "is not a dataclass, so its options are not known"
    else:
        try:
            again = from_dict(json.loads(json.dumps(schedule.to_dict())))
        except (TypeError, ValueError) as error:
            lacks = f"has options that JSON cannot hold or that it does not take: {error}"
        else:
            if again != schedule:
                lacks = f"reads back as {again!r}, which is not equal to {schedule!r}"
    if lacks:
        raise ValueError(
            f"{kind.__name__} {lacks}, and a checkpoint could not be read again. Make it a frozen "
            'dataclass with `name: ClassVar[str] = "..."` and fields that JSON can hold.'
        )


def from_dict(data: object) -> Schedule:
    """The inverse of `Schedule.to_dict`.

    Raises:
        TypeError: if `data` is not a mapping.
        ValueError: if its name is unknown, or an option is not one of this schedule's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a schedule must be an object with a name; found {data!r}.")
    options = {str(key): value for key, value in data.items()}
    name = options.pop("name", None)
    schedules = _schedules()
    kind = schedules.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"schedule {name!r} is unknown. Use {', '.join(repr(kind.name) for kind in _OURS)}, or "
            "import the module that defines it first."
        )
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"schedule {name!r} has no option {unknown[0]!r}. It has {', '.join(known) or 'none'}."
        )
    return kind(**options)
