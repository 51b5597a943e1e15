"""How far back in time a gradient reaches, as plain data: written into records, and read where there is no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, eq=False)
class TimeProfile:
    """Norm of ∂ loss_t / ∂ x_{t−k} by the lag k, over several rows and positions t.

    A lag counts tokens, 0 being the token t itself, whose own loss is that of the next one.
    """

    mean: Floats
    """`[lags]`, the geometric mean of the samples that are not zero; 0 where half of them or more are.

    Each loss has a scale of its own (a token that was foreseen gives a small gradient at every lag), and with the same
    samples behind each lag that scale cancels in the ratio of two geometric means: what is left is how fast the
    gradient falls, every sample having one vote. A root mean square would be the profile of the few largest losses."""
    quantiles: Floats
    """`[lags, 3]`: 10 %, 50 % and 90 % of the samples lie at it or below."""
    zero_share: Floats
    """`[lags]`, the share of samples that are exactly zero: behind the window of a local attention, behind a dead ReLU,
    below what the dtype of the gradient can hold."""
    samples: Integers
    """`[lags]`, how many rows and positions there were."""
    norms: Floats | None = None
    """`[rows and positions, lags]`, L2 norms in float64; NaN before the row's first token, infinity where a gradient
    overflowed. None in what was read from a record."""

    @classmethod
    def of(cls, norms: Floats) -> TimeProfile:
        """Sums up norms `[rows and positions, lags]`, NaN where there is none; each lag needs one."""
        there = ~np.isnan(norms)
        samples = np.count_nonzero(there, axis=0)
        zeros = np.count_nonzero(norms == 0, axis=0) / samples
        with np.errstate(divide="ignore"):
            logs = np.log(np.where(norms == 0, np.nan, norms))
        sums = np.nansum(logs, axis=0)
        mean = np.where(zeros < 0.5, np.exp(sums / np.maximum(np.count_nonzero(~np.isnan(logs), axis=0), 1)), 0.0)
        # A quantile is one of the samples: between a number and infinity there is nothing to interpolate.
        quantiles = np.nanquantile(norms, QUANTILES, axis=0, method="inverted_cdf").T
        return cls(mean, quantiles, zeros, samples, norms)

    @cached_property
    def lags(self) -> Integers:
        """`[lags]`: 0, 1, 2 …"""
        return np.arange(len(self.mean))

    @cached_property
    def relative(self) -> Floats:
        """`mean` ÷ that of lag 0, `[lags]`; NaN where that is zero or not finite."""
        first = float(self.mean[0])
        if first == 0 or not math.isfinite(first):
            return np.full(len(self.mean), np.nan)
        return self.mean / first

    def lag_of(self, share: float) -> int | None:
        """The first lag at which no more than that share of lag 0's mean is left; None where there is always more."""
        below = np.flatnonzero(self.relative <= share)
        return int(below[0]) if len(below) else None

    @property
    def half_life(self) -> int | None:
        """The first lag at which no more than half of lag 0's mean is left; None where there is always more."""
        return self.lag_of(0.5)

    @property
    def e_folds(self) -> float:
        """How many factors of e the mean loses from one lag to the next, negative where it grows: a line fitted to its
        logarithm by least squares. Lag 0 is left out, as in a model with residual connections a way without any mixing
        of tokens leads there and nowhere else. NaN with fewer than two lags to fit."""
        usable = (self.lags > 0) & (self.mean > 0) & np.isfinite(self.mean)
        if np.count_nonzero(usable) < 2:
            return math.nan
        slope = np.polynomial.Polynomial.fit(self.lags[usable], np.log(self.mean[usable]), 1).convert().coef
        return -float(slope[1]) if len(slope) > 1 else 0.0

    def describe(self) -> str:
        """The profile in one plain sentence."""
        if np.isnan(self.relative).any():
            return "The gradient at the token itself is zero or not finite, so nothing can be said of its fall."
        last = int(self.lags[-1])
        half, hundredth = self.lag_of(0.5), self.lag_of(0.01)
        if half is None:
            fall = f"does not fall to half within {_tokens(last)}"
        elif hundredth is None:
            fall = f"is down to half {_tokens(half)} back and does not fall to 1 % within {_tokens(last)}"
        elif hundredth == half:
            fall = f"is down to 1 % {_tokens(half)} back"
        else:
            fall = f"is down to half {_tokens(half)} back and to 1 % {_tokens(hundredth)} back"
        return f"The gradient {fall}; {_tokens(last)} back it is {self._rest()}."

    def _rest(self) -> str:
        left, before = float(self.relative[-1]), float(self.mean[1])
        if left == 0:
            return "zero to the precision it was measured in"
        # Beside a residual connection, which leads to the token itself alone, lag 1 is what tells of the mixing.
        beside = before > 0 and len(self.mean) > 2
        later = f" and {self.mean[-1] / before:#.2g} times what it is 1 token back" if beside else ""
        return f"{left:#.2g} times what it is at the token itself{later}"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"
