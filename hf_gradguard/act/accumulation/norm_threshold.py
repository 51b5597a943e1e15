"""`norm_threshold`: when the accumulated gradient is long enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.checks import check_above_zero, check_whole


@policies.register("norm_threshold")
@dataclass
class NormThreshold(AccumulationPolicy):
    """Updates when the norm of the accumulated gradient reaches `threshold`, or with `max_windows` windows.

    With `reduce="sum"` it is the textbook's accumulation: G ← G + ∇L_t after each window, and when ‖G‖ ≥ threshold,
    θ ← θ − η G and G ← 0. The windows' gradients are added as they are, unweighted, so that an update of k windows is
    about k times as long: with SGD as if each had been applied at once.

    With `reduce="mean"` the update is the mean of the windows weighted by target tokens, and ‖mean‖ ≥ threshold is what
    is asked. A mean gets shorter as noise averages out, so that a threshold above the norm of single windows is mostly
    answered by `max_windows`; choose `sum` for a norm that grows.

    There is no paper behind it, and no threshold that fits every model: see the norms in a run's log or report first.
    Departure from the formula: `max_windows`, without which a vanished gradient would wait for ever.
    """

    threshold: float
    """L2 norm of all gradients together, before clipping."""
    max_windows: int = 8
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_above_zero(threshold=self.threshold)
        check_whole(1, max_windows=self.max_windows)
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce={self.reduce!r} must be 'mean' or 'sum'")

    def decide(self, held: Held) -> Choice:
        update = held.norm >= self.threshold or held.windows >= self.max_windows
        return Choice(update, held.norm, self.threshold)
