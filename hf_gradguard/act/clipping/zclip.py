"""Clipping of norms that are outliers among the recent ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, policies

# As the authors' package has it: kept off zero are the standard deviation and the norm that is divided by.
_EPSILON = 1e-6


@policies.register("zclip")
@dataclass
class ZClip(ClipPolicy):
    """Clips a norm that lies far above the moving average of the norms.

    With mean μ and variance σ² of the norms so far and z_t = (‖g_t‖ − μ) ÷ σ, a norm with z_t > z_thresh is clipped to
    μ + z_thresh² ÷ z_t · σ: the more of an outlier it is, the nearer to the mean it is brought. Then, with n the norm
    after this, μ ← α·μ + (1 − α)·n and σ² ← α·σ² + (1 − α)·(n − μ)², with the new μ. Both begin as the mean and
    variance of the first `warmup_steps` norms.

    Abhay Kumar, Louis Owen, Nilabhra Roy Chowdhury, Fabian Güra 2025, "ZClip: Adaptive spike mitigation for LLM
    pre-training", arXiv 2504.02507, algorithm 1. Defaults and details are those of the authors' package `zclip`: a hard
    limit `max_norm` applies on top, during the warm-up too, and neither it nor the warm-up changes what the averages
    are fed. Unlike the package, a NaN, an infinity or a gradient of zero never enters the averages.
    """

    alpha: float = 0.97
    """How much of the averages an update keeps, from 0 to below 1."""
    z_thresh: float = 2.5
    """Standard deviations above the mean from which a norm is clipped."""
    max_norm: float | None = 1.0
    """Hard limit of the norm; None for none."""
    warmup_steps: int = 25
    """Updates whose norms are collected before the averages begin."""
    first_norms: list[float] = field(default_factory=list, init=False)
    """The norms of the warm-up, while it lasts."""
    mean: float | None = field(default=None, init=False)
    """μ; None during the warm-up."""
    variance: float = field(default=0.0, init=False)
    """σ²."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must be from 0 to below 1")
        check_above_zero(z_thresh=self.z_thresh)
        if self.max_norm is not None:
            check_above_zero(max_norm=self.max_norm)
        check_whole(1, warmup_steps=self.warmup_steps)

    def clip(self, gradient: Gradient) -> HostClip | None:
        """See `ClipPolicy`."""
        if not gradient.is_clippable:
            return None
        norm = gradient.total_norm
        limit = math.inf if self.max_norm is None else self.max_norm
        if self.mean is None:
            self._collect(norm)
            return HostClip.whole(gradient, limit, epsilon=_EPSILON)
        usual = self._usual(norm, self.mean)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * usual
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (usual - self.mean) ** 2
        threshold = min(usual, limit)
        return HostClip.whole(gradient, threshold, epsilon=_EPSILON) if norm > threshold else None

    def state_dict(self) -> dict[str, Any]:
        """See `ClipPolicy`."""
        return {"first_norms": list(self.first_norms), "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ClipPolicy`."""
        self.first_norms = list(state["first_norms"])
        self.mean = state["mean"]
        self.variance = state["variance"]

    def _collect(self, norm: float) -> None:
        self.first_norms.append(norm)
        count = len(self.first_norms)
        if count >= self.warmup_steps:
            self.mean = sum(self.first_norms) / count
            self.variance = sum((known - self.mean) ** 2 for known in self.first_norms) / count
            self.first_norms = []

    def _usual(self, norm: float, mean: float) -> float:
        """The norm itself, or what it is brought down to if it is an outlier."""
        deviation = math.sqrt(self.variance)
        z = (norm - mean) / (deviation + _EPSILON)
        return norm if z <= self.z_thresh else mean + self.z_thresh**2 / z * deviation
