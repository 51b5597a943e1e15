"""Checks of a policy's options; each error names the option, its value and what would fit."""

from __future__ import annotations

import math


def check_above_zero(**options: float) -> None:
    """Raises ValueError for an option that is not a finite number above 0."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be above 0 and finite")


def check_whole(least: int, **options: int) -> None:
    """Raises ValueError for an option that is not a whole number of at least `least`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_order(min_windows: int, max_windows: int) -> None:
    """Raises ValueError where so many windows can never be held."""
    if min_windows > max_windows:
        raise ValueError(f"min_windows={min_windows} must not be above max_windows={max_windows}")
