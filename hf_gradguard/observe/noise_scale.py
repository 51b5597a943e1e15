"""How noisy the gradient is: the gradient noise scale, from the windows of one update.

Let window i be a mean over n_i independent units (target tokens, or examples), so that its gradient g_i has mean G and
covariance Σ / n_i. The noise scale tr(Σ) / |G|² is the batch, in these units, at which noise and gradient are equally
strong; far smaller batches waste steps, far larger ones waste data.

    With N = Σ n_i and ĝ = Σ n_i g_i / N:  E Σ n_i |g_i|² = N |G|² + k tr(Σ)  and  E N |ĝ|² = N |G|² + tr(Σ),
    so S = (Σ n_i |g_i|² − N |ĝ|²) / (k − 1)  estimates tr(Σ), and  |ĝ|² − S / N  estimates |G|², both without bias.

Source: McCandlish, Kaplan, Amodei and the OpenAI Dota Team 2018, arXiv 1812.06162, equation 2.9 for the noise scale,
appendix A.1 for the estimators and for smoothing the two apart: their ratio is biased, that of their averages hardly.
It departs from them in taking all k windows of an update, of unequal size, where they take one small and one large
batch of fixed sizes; with k equal windows the two are the same. The tokens of one text are not independent: the scale
in tokens is that in examples times the tokens of an example.

The estimates are without bias as long as the number of windows does not depend on their gradients: a policy that looks
at the gradient to decide when to stop (`norm_threshold`, `norm_test`) chooses the windows that it measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class GradientNoise:
    """What the windows of one update say about the noise. NaN where fewer than two of them hold anything."""

    trace: float
    """S, the estimate of tr(Σ): squared norm of the noise of a batch of one unit. Below 0 by chance where the windows
    hardly differ."""
    squared_gradient: float
    """The estimate of |G|², the squared norm of the gradient without noise. Below 0 by chance where noise drowns it."""
    squared_error: float
    """The estimate of the squared error of the windows' mean; S / N where every unit counts the same."""


def gradient_noise(
    weights: ArrayLike, squares: ArrayLike, mean_square: float, shares: ArrayLike | None = None
) -> GradientNoise:
    """The unbiased estimates from one update.

    Args:
        weights: how many units each window is a mean over `[windows]`; one of 0 has no say.
        squares: squared norm of each window's gradient `[windows]`.
        mean_square: squared norm of their mean.
        shares: what each window weighs in that mean `[windows]`, where it is not `weights`, to any scale. For shares w
            the derivation above gives S = (Σ w_i |g_i|² − W |ĝ|²) / (Σ w_i/n_i − Σ (w_i²/n_i) / W), with W = Σ w_i.
    """
    count = np.asarray(weights, dtype=np.float64)
    known = count > 0
    count, square = count[known], np.asarray(squares, dtype=np.float64)[known]
    share = count if shares is None else np.asarray(shares, dtype=np.float64)[known]
    if len(count) < 2:
        return GradientNoise(math.nan, math.nan, math.nan)
    share = share / share.sum()
    part = float(np.sum(share**2 / count))  # of tr(Σ), that is left in the mean
    scatter = float(np.sum(share * square)) - mean_square
    trace = scatter / (float(np.sum(share / count)) - part)
    return GradientNoise(trace, mean_square - trace * part, trace * part)


class NoiseScale:
    """The gradient noise scale over many updates. Each of the two estimates is averaged for itself, exponentially, with
    the start corrected for as Adam does, and the ratio is taken of the averages.

    Args:
        smoothing: share of an average that stays from one update to the next, from 0 to below 1; 0.95 looks back on
            about 20 updates. More is steadier where the noise scale is far above the batch; less forgets sooner what
            the large gradients of the start, or of a spike, have told.

    Raises:
        ValueError: for another smoothing.

    Example:
        >>> scale = NoiseScale()
        >>> scale.add(gradient_noise([8, 8], [3.0, 5.0], 3.0))
        >>> scale.value  # S = 8 × (8 − 6), |G|² = 3 − S / 16
        8.0
    """

    def __init__(self, smoothing: float = 0.95) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must be from 0 to below 1")
        self.smoothing = smoothing
        self._updates = 0
        self._trace = 0.0
        self._squared_gradient = 0.0

    def add(self, noise: GradientNoise) -> None:
        """Takes in one update; one that tells nothing (a single window) or is not finite is passed over."""
        if not (math.isfinite(noise.trace) and math.isfinite(noise.squared_gradient)):
            return
        self._updates += 1
        self._trace += (1 - self.smoothing) * (noise.trace - self._trace)
        self._squared_gradient += (1 - self.smoothing) * (noise.squared_gradient - self._squared_gradient)

    @property
    def trace(self) -> float:
        """The average of S; NaN before the first update."""
        return self._trace / self._started if self._updates else math.nan

    @property
    def squared_gradient(self) -> float:
        """The average of |G|²; NaN before the first update."""
        return self._squared_gradient / self._started if self._updates else math.nan

    @property
    def value(self) -> float:
        """The noise scale, in the unit of the weights; NaN while unknown, or while the estimate of |G|² is not above 0
        because noise drowns the gradient."""
        return self.trace / self.squared_gradient if self.squared_gradient > 0 else math.nan

    @property
    def _started(self) -> float:
        """What the averages, which began at 0, have taken in so far."""
        return 1 - self.smoothing**self._updates

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values."""
        return {"updates": self._updates, "trace": self._trace, "squared_gradient": self._squared_gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._updates = int(state["updates"])
        self._trace = float(state["trace"])
        self._squared_gradient = float(state["squared_gradient"])
