"""Checks of single values that users pass in, each with its message."""

from __future__ import annotations

import math
from numbers import Real


def as_number(value: object, name: str) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: if it is no number (a bool is none).
        ValueError: if it is NaN or infinite.
    """
    number = _as_float(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; found {value!r}.")
    return number


def as_density(value: object, name: str = "density") -> float:
    """`value` as a fraction of units kept, above 0 and at most 1.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or NaN.
    """
    number = _as_float(value, name)
    if not 0 < number <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1: it is the fraction of units kept; "
            f'found {value!r}. To leave a weight alone, use overrides={{"its name": None}}.'
        )
    return number


def as_count(value: object, name: str, least: int = 1) -> int:
    """`value` as a whole number of at least `least`.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; found {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; found {value}.")
    return value


def _as_float(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; found {value!r} ({type(value).__name__}).")
    return float(value)
