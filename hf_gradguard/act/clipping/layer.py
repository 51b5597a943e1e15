"""Clipping of every layer for itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.act.clipping.global_norm import EPSILON
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, Outcome, policies
from hf_gradguard.observe.norms import NO_GRADIENT


@policies.register("layer")
@dataclass
class Layer(ClipPolicy):
    """Multiplies the gradients of each layer l with min(1, max_norm ÷ (‖g_l‖ + 1e-6)), ‖g_l‖ being the L2 norm of that
    layer's gradients, so that one layer's spike leaves the others alone. Layers are the groups of the layout:
    embeddings, each transformer block, final norm, head.

    H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang 2018, "Learning differentially private recurrent language
    models", arXiv 1710.06963, section on per-layer clipping. The paper clips what a user's examples change, and may
    give each layer another limit; here it is the gradient, and one limit for all.
    """

    max_norm: float = 1.0
    """The largest norm of a layer that is left alone."""

    def __post_init__(self) -> None:
        check_above_zero(max_norm=self.max_norm)

    def clip(self, gradient: Gradient) -> HostClip | None:
        """See `ClipPolicy`."""
        if not gradient.is_clippable:
            return None
        squares = np.where(gradient.norms == NO_GRADIENT, 0.0, np.square(gradient.norms))
        layers = np.sqrt(np.bincount(gradient.groups, weights=squares))
        coefficients = np.minimum(1.0, self.max_norm / (layers + EPSILON))
        worst = int(np.argmin(coefficients))
        if coefficients[worst] >= 1:
            return None
        found = Outcome(float(coefficients[worst]), float(layers[worst]), self.max_norm, group=worst)
        return HostClip(coefficients[gradient.groups].tolist(), found)
