"""What an accumulation policy sees, what it answers, and where it is registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hf_gradguard.registry import Registry


@dataclass(frozen=True)
class Held:
    """What is held for the next update, the window that has just ended included."""

    step: int
    """The window's number in the run."""
    windows: int
    """Windows held, from 1."""
    weight: float
    """Target tokens held (micro-batches where there are no labels)."""
    window_norm: float
    """L2 norm of this window's gradient."""
    norm: float
    """L2 norm of the accumulated gradient as the update would use it: of the mean, or of the sum where the policy has
    `reduce="sum"`."""
    variance: float
    """Estimate of the squared error of the mean (`hf_gradguard.observe.noise_scale`); NaN with one window, and below 0
    by chance where the windows hardly differ."""
    mean_norm: float
    """L2 norm of the mean, whatever `reduce` is."""
    noise_scale: float
    """Gradient noise scale in the unit of `weight`, smoothed over earlier updates; NaN while unknown, or while noise
    drowns the gradient."""
    windows_seen: int
    """Windows of the whole run, this one included."""
    weight_seen: float
    """Target tokens of the whole run, this window's included."""


@dataclass(frozen=True)
class Choice:
    """A policy's answer, with the two numbers that it compared, for the record."""

    update: bool
    """Whether the optimizer steps now."""
    value: float
    """What was measured."""
    threshold: float
    """What it was compared with; NaN where that is unknown."""


class AccumulationPolicy(Protocol):
    """Decides window by window whether the optimizer steps. Make your own by deriving from it.

    With `reduce="sum"` among its fields a policy gets the plain sum of the windows' gradients; without such a field, or
    with `"mean"`, their mean weighted by target tokens.
    """

    def decide(self, held: Held) -> Choice:
        """Whether to update with what is held."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values; nothing, unless a policy remembers something."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""


policies: Registry[AccumulationPolicy] = Registry("accumulate", absent="none")
