"""Long records made small enough to draw: blocks of updates and layers in place of each one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.judge import Stack

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Typical gradient norms of blocks of layers in blocks of updates."""

    first_step: Integers
    """First step of each block of updates `[rows]`."""
    last_step: Integers
    """Last step of each block of updates `[rows]`."""
    layers: tuple[tuple[int, ...], ...]
    """Places of the layers of each block `[columns]`; a block lies within one stack."""
    norms: Floats
    """L2 norms `[rows, columns]`: the median on the log scale over what is above zero; 0 where all is exactly zero,
    infinity where nothing is finite, NaN where no layer of the block had a gradient."""


@dataclass(frozen=True)
class Curve:
    """One number over time: median and range within blocks of updates, NaN where nothing is finite."""

    first_step: Integers
    last_step: Integers
    middle: Floats
    low: Floats
    high: Floats


def cells(
    steps: Integers, layer_norms: Floats, nonfinite: NDArray[np.bool_], stacks: Sequence[Stack], rows: int, columns: int
) -> Cells:
    """Summarises layer norms over time in about `rows` × `columns` blocks of equal size.

    Args:
        steps: step of each window `[windows]`.
        layer_norms: L2 norms `[windows, layers]`, NaN where a layer had no gradient.
        nonfinite: the windows whose gradient was not finite `[windows]`.
        stacks: which layers follow one another.
        rows: most blocks of updates.
        columns: most blocks of layers, but for the incomplete last one of each further stack.
    """
    starts, width = _blocks(len(steps), rows)
    layers = _layer_blocks(stacks, columns)
    chosen = np.ix_(_padded(starts, width, len(steps)).ravel(), _layer_index(layers, layer_norms.shape[1]).ravel())
    shape = (len(starts), width, len(layers), -1)
    logs = np.pad(_logs(layer_norms), ((0, 1), (0, 1)), constant_values=np.nan)[chosen].reshape(shape)
    states = np.pad(_states(layer_norms, nonfinite), ((0, 1), (0, 1)))[chosen].reshape(shape).max(axis=(1, 3))
    medians = np.exp(_median(logs.transpose(0, 2, 1, 3).reshape(len(starts), len(layers), -1)))
    return Cells(
        first_step=steps[starts],
        last_step=steps[_last(starts, width, len(steps))],
        layers=layers,
        norms=np.choose(states, [np.nan, np.inf, 0.0, medians]),
    )


def curve(steps: Integers, values: Floats, points: int) -> Curve:
    """Summarises one number over time `[windows]` in at most `points` blocks of updates."""
    starts, width = _blocks(len(steps), points)
    finite = np.where(np.isfinite(values), values, np.nan)
    blocks = np.append(finite, np.nan)[_padded(starts, width, len(steps))]
    ordered = np.sort(blocks, axis=1)  # NaN goes to the end
    last = np.maximum(np.count_nonzero(~np.isnan(ordered), axis=1) - 1, 0)
    return Curve(
        first_step=steps[starts],
        last_step=steps[_last(starts, width, len(steps))],
        middle=_median(blocks),
        low=ordered[:, 0],
        high=ordered[np.arange(len(ordered)), last],
    )


def _blocks(count: int, limit: int) -> tuple[Integers, int]:
    """Where at most `limit` blocks of equal width begin, and the width."""
    width = max(1, -(-count // limit))
    return np.arange(0, count, width, dtype=np.int64), width


def _padded(starts: Integers, width: int, count: int) -> Integers:
    """Places of each block's members `[blocks, width]`; `count`, one past the last, where a block has fewer."""
    places: Integers = np.minimum(starts[:, None] + np.arange(width), count)
    return places


def _last(starts: Integers, width: int, count: int) -> Integers:
    ends: Integers = np.minimum(starts + width, count) - 1
    return ends


def _layer_blocks(stacks: Sequence[Stack], limit: int) -> tuple[tuple[int, ...], ...]:
    _, width = _blocks(sum(len(stack.columns) for stack in stacks), limit)
    return tuple(
        stack.columns[start : start + width] for stack in stacks for start in range(0, len(stack.columns), width)
    )


def _layer_index(blocks: Sequence[Sequence[int]], count: int) -> Integers:
    width = max((len(block) for block in blocks), default=1)
    return np.array([[*block, *[count] * (width - len(block))] for block in blocks], dtype=np.int64).reshape(-1, width)


def _logs(norms: Floats) -> NDArray[np.float32]:
    """Natural logarithms, NaN where there is none. In float32, as the norms were recorded: sorting is twice as fast."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(norms).astype(np.float32)
    logs[~np.isfinite(logs)] = np.nan
    return logs


def _states(norms: Floats, nonfinite: NDArray[np.bool_]) -> NDArray[np.int8]:
    """What each norm is, the more telling the larger: 0 no gradient, 1 not finite, 2 exactly zero, 3 a number."""
    states = np.zeros(norms.shape, dtype=np.int8)
    finite = norms[~nonfinite]
    trained = ~np.isnan(finite).all(axis=0) | (len(finite) == 0)
    states[np.isinf(norms) | (np.isnan(norms) & nonfinite[:, None] & trained)] = 1
    states[norms == 0] = 2
    states[(norms > 0) & ~np.isinf(norms)] = 3
    return states


def _median(values: NDArray[Any]) -> Floats:
    """Median along the last axis of what is not NaN; NaN where all is. Faster than numpy's own for many short rows."""
    ordered = np.sort(values, axis=-1)
    count = np.count_nonzero(~np.isnan(ordered), axis=-1)[..., None]
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, count // 2, axis=-1)
    median: Floats = 0.5 * (low + high)[..., 0].astype(np.float64)
    return median
