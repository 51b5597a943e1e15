"""How the gradient is spread over depth: one robust description of a stack of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STARVING_SHARE = 1e-3
"""A layer starves when it gets less than this share of what the healthy top of its stack gets."""
_FIT_POINTS = 64
"""Layers that the line is fitted through: the pairs of more would cost more than a millisecond."""
_TOP_SPREAD = math.log(10.0)
"""Layers of the top quarter count as its healthy part when they are within this of its largest (log-norm)."""
_LARGEST_LOG = 700.0
"""Ratios beyond e^700 are reported as e^700, so that a description holds finite numbers only."""


@dataclass(frozen=True)
class DepthProfile:
    """The gradient of a stack over depth, of a window of updates. Layer 0 is the one nearest the input.

    A ratio is NaN where fewer than two layers have a gradient to compare.
    """

    levels: NDArray[np.float64]
    """Typical L2 norm of each layer `[layers]`: the median on the log scale over the updates in which a gradient
    arrived; 0 for a dead layer (only exact zeros), NaN for an absent one (no gradient at all: frozen or unused)."""
    share: NDArray[np.float64]
    """Share of the stack's squared gradient that each layer gets `[layers]`; NaN for an absent layer."""
    decay_per_layer: float
    """Factor by which the norm changes from one layer to the next one towards the input: under 1 it fades."""
    first_to_last: float
    """Norm of the first layer with a gradient ÷ norm of the last one."""
    bottom_to_top: float
    """Typical norm of the lowest eighth of the layers ÷ that of the healthy top. Says the same as `first_to_last`
    where the profile is smooth, and is not moved by one odd layer at either end of a deep stack."""
    starving: int | None
    """Index below which every layer with a gradient gets less than the starving share of the healthy top, or None."""

    @property
    def dead(self) -> NDArray[np.intp]:
        """Indices of the layers whose gradient was exactly zero throughout."""
        return np.flatnonzero(self.levels == 0.0)

    @property
    def alive(self) -> NDArray[np.intp]:
        """Indices of the layers that had a gradient other than zero."""
        return np.flatnonzero(self.levels > 0.0)


def depth_profile(norms: ArrayLike, *, starving_share: float = STARVING_SHARE) -> DepthProfile:
    """Describes how the gradient norm changes with depth.

    The line through the log-norms is Theil and Sen's (P. K. Sen 1968, doi:10.1080/01621459.1968.10480934): its slope is
    the median of those of all pairs of points, so that up to 29 % of odd layers can't carry it away. Of more than 64
    layers, 64 at even distances are used.

    Args:
        norms: L2 norm of each layer's gradient `[updates, layers]`; NaN where a layer had no gradient.
        starving_share: the share of the healthy top's norm under which a layer starves.

    Raises:
        ValueError: `norms` has another shape, or holds an infinite or negative number.
    """
    array = np.asarray(norms, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"norms has shape {array.shape}; give an array [updates, layers] with at least one of each")
    if np.any(array < 0) or np.any(np.isinf(array)):
        raise ValueError("norms holds an infinite or negative number; leave updates with a non-finite gradient out")
    logs = _median_log(array)
    alive = np.flatnonzero(~np.isnan(logs))
    absent: NDArray[np.bool_] = np.all(np.isnan(array), axis=0)
    heights = logs[alive]
    top = _healthy_top(heights)
    return DepthProfile(
        levels=np.where(absent, np.nan, np.exp(np.where(np.isnan(logs), -np.inf, logs))),
        share=_share(logs, absent),
        decay_per_layer=_exp(-_slope(alive, heights)),
        first_to_last=_exp(heights[0] - heights[-1]) if alive.size > 1 else math.nan,
        bottom_to_top=_exp(float(np.median(heights[: _part(alive.size, 8)])) - top) if alive.size > 1 else math.nan,
        starving=_starving(alive, heights, top + math.log(starving_share)),
    )


def _median_log(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over updates of each layer's log-norm; NaN where no norm is above zero."""
    ordered = np.sort(np.where(norms > 0, norms, np.nan).T, axis=1)  # NaN sorts to the end
    count = np.count_nonzero(~np.isnan(ordered), axis=1)
    layers = np.arange(len(ordered))
    low, high = ordered[layers, (count - 1) // 2], ordered[layers, count // 2]
    median: NDArray[np.float64] = 0.5 * (np.log(low) + np.log(high))
    return median


def _healthy_top(heights: NDArray[np.float64]) -> float:
    if not heights.size:
        return math.nan
    quarter = heights[-_part(heights.size, 4) :]
    return float(np.median(quarter[quarter >= quarter.max() - _TOP_SPREAD]))


def _part(count: int, divisor: int) -> int:
    return max(1, count // divisor)


def _share(logs: NDArray[np.float64], absent: NDArray[np.bool_]) -> NDArray[np.float64]:
    shares = np.where(absent, np.nan, 0.0)
    alive = ~np.isnan(logs)
    if alive.any():
        squares = np.exp(2.0 * (logs[alive] - logs[alive].max()))
        shares[alive] = squares / squares.sum()
    return shares


def _slope(depth: NDArray[np.intp], heights: NDArray[np.float64]) -> float:
    """Theil–Sen slope of log-norm over depth."""
    if depth.size < 2:
        return math.nan
    if depth.size > _FIT_POINTS:
        chosen = np.linspace(0, depth.size - 1, _FIT_POINTS).round().astype(np.intp)
        depth, heights = depth[chosen], heights[chosen]
    first, second = np.triu_indices(depth.size, k=1)
    return float(np.median((heights[second] - heights[first]) / (depth[second] - depth[first])))


def _starving(alive: NDArray[np.intp], heights: NDArray[np.float64], line: float) -> int | None:
    fed = np.flatnonzero(heights >= line)
    return int(alive[fed[0]]) if fed.size and fed[0] > 0 else None


def _exp(log: float) -> float:
    return math.exp(min(log, _LARGEST_LOG))
