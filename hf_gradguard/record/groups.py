"""From parameters to groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hf_gradguard.observe.layout import Layout

NO_GRADIENT = -1.0


def group_norms(layout: Layout, norms: NDArray[np.floating]) -> NDArray[np.float64]:
    """L2 norm over the parameters of each group, taken in float64.

    Args:
        layout: of the parameters.
        norms: `[n, parameters]`, −1 where a parameter had no gradient.

    Returns:
        `[n, groups]`, −1 where no parameter of the group had a gradient, NaN where one of them was NaN.
    """
    missing = norms == NO_GRADIENT
    squares = norms.astype(np.float64)
    np.square(squares, out=squares)
    squares[missing] = 0.0
    result: NDArray[np.float64] = np.sqrt(layout.group_squares(squares))
    if missing.any():
        result[layout.group_squares(~missing) == 0] = NO_GRADIENT
    return result


def group_updates(
    layout: Layout, norms: NDArray[np.float64], ratios: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight norm and update-to-weight ratio of each group, from those of its parameters.

    The ratio is √Σ(ratioᵢ·normᵢ)² ÷ √Σ normᵢ². A parameter whose ratio is unknown or infinite (its weights were all
    zero before the update) adds nothing to the numerator.

    Args:
        layout: of the parameters.
        norms: L2 norm of each weight before the update, `[parameters]`.
        ratios: norm of each weight's update ÷ norm of the weight, `[parameters]`.

    Returns:
        Norms and ratios, `[groups]`; the ratio is NaN where the norm is zero.
    """
    updates = np.where(np.isfinite(ratios), ratios, 0.0) * norms
    weights = np.sqrt(layout.group_squares(np.square(norms)))
    moved = np.sqrt(layout.group_squares(np.square(updates)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights, np.where(weights > 0, moved / weights, np.nan)
