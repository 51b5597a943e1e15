"""What one window's gradients were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.observe.layout import Layout
from hf_gradguard.observe.norms import NO_GRADIENT


@dataclass(frozen=True)
class Reading:
    """The gradients of one window, before any clipping, after reduction over ranks and unscaling of mixed precision."""

    step: int
    """The Trainer's `global_step` at the end of the window (1 for the first)."""
    layout: Layout
    parameter_norms: NDArray[np.float64]
    """L2 norms `[parameters]` in the layout's order; `NO_GRADIENT` (−1) where a parameter got none."""
    loss: float | None
    """The window's loss as it was back-propagated (the sum over its micro-batches), or None where none was seen."""
    learning_rate: float | None
    """The learning rate of the optimizer's first group for this update."""
    accumulated_norm: float
    """L2 norm of what is held for the next update, this window included: the window's own norm where nothing is held
    back."""

    @property
    def total_norm(self) -> float:
        """L2 norm of all gradients together."""
        return float(np.sqrt(np.sum(self._squares())))

    def norms(self) -> dict[str, float | None]:
        """L2 norm of each parameter's gradient, under each of its names; None for a parameter that got no gradient."""
        found: dict[str, float | None] = {}
        for info, norm in zip(self.layout.parameters, self.parameter_norms.tolist(), strict=True):
            for name in (info.name, *info.aliases):
                found[name] = None if norm == NO_GRADIENT else norm
        return found

    def group_norms(self) -> NDArray[np.float64]:
        """L2 norm of each group's gradient `[groups]`; NaN for a group none of whose parameters got one."""
        norms = np.sqrt(self.layout.group_squares(self._squares()))
        has_gradient = self.layout.group_squares((self.parameter_norms != NO_GRADIENT).astype(np.float64)) > 0
        return np.where(has_gradient, norms, np.nan)

    def layer_norms(self) -> list[float]:
        """L2 norm of each layer's gradient in depth order; NaN for a layer that got none."""
        norms = self.group_norms()
        return [float(norms[index]) for index in self.layout.layers]

    @property
    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity."""
        bad = np.flatnonzero(~np.isfinite(self.parameter_norms))
        return [self.layout.parameters[index].name for index in bad]

    def _squares(self) -> NDArray[np.float64]:
        return np.where(self.parameter_norms == NO_GRADIENT, 0.0, np.square(self.parameter_norms))
