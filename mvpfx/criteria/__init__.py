"""All criteria by name: a new one is a file here, and a line in `_CRITERIA`."""

from __future__ import annotations

from collections.abc import Mapping

from mvpfx.checks import as_number
from mvpfx.criteria.ema_magnitude import EmaMagnitude
from mvpfx.criteria.l0 import L0
from mvpfx.criteria.magnitude import Magnitude
from mvpfx.criteria.movement import Movement
from mvpfx.criteria.platon import Platon
from mvpfx.criteria.random import Random
from mvpfx.criteria.saliency import Saliency
from mvpfx.criteria.second_order import SecondOrder
from mvpfx.criteria.soft_movement import SoftMovement
from mvpfx.criterion import Criterion

_CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Movement(),
        SoftMovement(),
        Magnitude(),
        L0(),
        Saliency(),
        EmaMagnitude(),
        Random(),
        Platon(),
        SecondOrder(),
    )
}


def register(criterion: Criterion) -> Criterion:
    """Make `criterion` available under its name; a later one of the same name replaces it."""
    _CRITERIA[criterion.name] = criterion
    return criterion


def names() -> list[str]:
    """Names of all criteria, in order of registration."""
    return list(_CRITERIA)


def find(name: object) -> Criterion:
    """The criterion called `name`.

    Raises:
        TypeError: if `name` is no text.
        ValueError: if there is none of that name.
    """
    if isinstance(name, str) and name in _CRITERIA:
        return _CRITERIA[name]
    known = ", ".join(f'"{known}"' for known in _CRITERIA)
    if not isinstance(name, str):
        raise TypeError(f"criterion must be a name; found {name!r}. Use one of {known}.")
    raise ValueError(f'criterion "{name}" is unknown. Use one of {known}.')


def check_options(name: str, values: Mapping[str, float]) -> None:
    """Make sure that a criterion has options of these names, and may take these values.

    Raises:
        TypeError: if a value is no number.
        ValueError: if a name is unknown or a value out of range.
    """
    options = find(name).options
    for key, value in values.items():
        if key not in options:
            known = ", ".join(f'"{known}"' for known in options) or "none"
            raise ValueError(f'criterion "{name}" has no option {key!r}. It has {known}.')
        number, option = as_number(value, f"criterion_options[{key!r}]"), options[key]
        if option.whole and number != int(number):
            raise TypeError(f"criterion_options[{key!r}] must be a whole number; found {value!r}.")
        if not option.least <= number <= option.most:
            raise ValueError(
                f"criterion_options[{key!r}] must be from {option.least:g} to {option.most:g}; "
                f"found {value!r}."
            )
