"""Clipping to a percentile of the norms so far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_gradguard.act.checks import check_whole
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, policies


@policies.register("autoclip")
@dataclass
class AutoClip(ClipPolicy):
    """Multiplies all gradients with min(1, η_t ÷ ‖g_t‖), where η_t is the p-th percentile of the norms
    ‖g_1‖ … ‖g_t‖ before clipping, this one included, with linear interpolation between two of them.

    Prem Seetharaman, Gordon Wichern, Bryan Pardo, Jonathan Le Roux 2020, "AutoClip: Adaptive gradient clipping for
    source separation networks", arXiv 2007.14469, algorithm 1. With the paper's p = 10 nine in ten updates are clipped:
    the learning rate must suit gradients that are nearly all of one size. There is no warm-up: the first norm is its
    own percentile and passes.

    The paper remembers every norm of the run; here it is the last `window` ones, 1000 as in the authors' package, since
    norms of long ago say little and the memory is saved with every checkpoint.
    """

    percentile: float = 10.0
    """p, from 0 (the smallest norm so far) to 100 (the largest: nothing is clipped)."""
    window: int = 1000
    """How many norms are remembered."""
    norms: deque[float] = field(init=False)
    """The last norms, oldest first."""

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must be from 0 to 100")
        check_whole(1, window=self.window)
        self.norms = deque(maxlen=self.window)

    def clip(self, gradient: Gradient) -> HostClip | None:
        """See `ClipPolicy`."""
        if not gradient.is_clippable:
            return None
        self.norms.append(gradient.total_norm)
        return HostClip.whole(gradient, float(np.percentile(self.norms, self.percentile)))

    def state_dict(self) -> dict[str, Any]:
        """See `ClipPolicy`."""
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ClipPolicy`."""
        self.norms = deque(state["norms"], maxlen=self.window)
