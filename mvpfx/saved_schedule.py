"""Schedules as plain data, the way back of `Schedule.to_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mvpfx.cut_schedule import OneShotSchedule, StepSchedule
from mvpfx.schedule import (
    ConstantSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
)

_SCHEDULES: dict[str, Any] = {
    kind.name: kind
    for kind in (
        CubicSchedule,
        LinearSchedule,
        ExponentialSchedule,
        StepSchedule,
        OneShotSchedule,
        ConstantSchedule,
    )
}


def from_dict(data: object) -> Schedule:
    """The way back of `Schedule.to_dict`.

    Raises:
        TypeError: if `data` is not a mapping.
        ValueError: if its name is unknown, or an option is not one of this schedule's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a schedule must be an object with a name; found {data!r}.")
    options = {str(key): value for key, value in data.items()}
    name = options.pop("name", None)
    kind = _SCHEDULES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"schedule {name!r} is unknown. Use {', '.join(map(repr, _SCHEDULES))}.")
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"schedule {name!r} has no option {unknown[0]!r}. It has {', '.join(known) or 'none'}."
        )
    return kind(**options)
