"""Where the verdicts draw their lines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hf_gradguard.judge.profile import STARVING_SHARE


@dataclass(frozen=True)
class Thresholds:
    """MEASURED

    Raises:
        ValueError: on making one with an impossible value; the message names the field, the value and what would fit.
    """

    window: int = 20
    """u"""
    min_updates: int = 10
    """u"""
    every: int = 5
    """u"""
    patience: int = 2
    """u"""
    min_layers: int = 4
    """u"""
    vanishing: float = 3e-3
    """u"""
    starving: float = STARVING_SHARE
    """u"""
    exploding: float = 1e3
    """u"""
    growth: float = 30.0
    """u"""
    zero_gradients: float = 0.5
    """u"""
    stalled_weights: float = 0.9
    """u"""

    def __post_init__(self) -> None:
        for name, lowest in (("window", 1), ("min_updates", 1), ("every", 1), ("patience", 1), ("min_layers", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"thresholds: {name}={value!r} must be a whole number from {lowest}")
        if self.min_updates > self.window:
            raise ValueError(
                f"thresholds: min_updates={self.min_updates} can't be more than window={self.window}, "
                "the updates that are kept"
            )
        for name in ("vanishing", "starving", "zero_gradients", "stalled_weights"):
            _check_between(name, getattr(self, name), 0.0, 1.0)
        for name in ("exploding", "growth"):
            _check_between(name, getattr(self, name), 1.0, math.inf)

    def to_dict(self) -> dict[str, int | float]:
        """The fields as JSON values; `Thresholds(**values)` is the inverse."""
        return dataclasses.asdict(self)


def _check_between(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < high:
        bounds = f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"thresholds: {name}={value!r} must be a finite number {bounds}")
