"""Clipping by the norm of the whole gradient."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, policies

EPSILON = 1e-6
"""torch divides by the norm plus this."""


@policies.register("global")
@dataclass
class GlobalNorm(ClipPolicy):
    """Multiplies all gradients with min(1, max_norm ÷ (‖g‖ + 1e-6)), ‖g‖ being the L2 norm of all of them together.

    Razvan Pascanu, Tomas Mikolov, Yoshua Bengio 2013, "On the difficulty of training recurrent neural networks",
    arXiv 1211.5063, algorithm 1. The 1e-6 is not in the paper but in `torch.nn.utils.clip_grad_norm_`, which this
    agrees with; unlike torch it multiplies nothing where the norm is below the limit.
    """

    max_norm: float = 1.0
    """The largest norm that is left alone."""

    def __post_init__(self) -> None:
        check_above_zero(max_norm=self.max_norm)

    def clip(self, gradient: Gradient) -> HostClip | None:
        """See `ClipPolicy`."""
        return HostClip.whole(gradient, self.max_norm, epsilon=EPSILON) if gradient.is_clippable else None
