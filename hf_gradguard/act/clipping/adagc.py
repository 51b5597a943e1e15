"""Clipping of every parameter relative to its own recent norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, HostClip, Outcome, policies


@policies.register("adagc")
@dataclass
class AdaGC(ClipPolicy):
    """Clips the gradient of a parameter that is larger than its own moving average of norms allows.

    For each parameter i, with γ_i the average of its norms after clipping, h_i = min(1, λ_rel·γ_i ÷ ‖g_i‖), and then
    γ_i ← β·γ_i + (1 − β)·h_i·‖g_i‖. In the first `warmup_steps` updates the gradient is clipped as a whole instead, by
    h = min(1, λ_abs ÷ ‖g‖), and γ_i is the smallest h·‖g_i‖ so far.

    Guoxia Wang, Shuai Li, Congliang Chen, Jinle Zeng, Jiabin Yang, Tao Sun, Yanjun Ma, Dianhai Yu, Li Shen 2025,
    "AdaGC: Improving training stability for large language model pretraining", arXiv 2502.11034, algorithm 1. Defaults
    are those of the authors' code; the first version of the paper has λ_rel = 1.05 and β = 0.98. Since γ_i is fed with
    clipped norms, it grows by no more than a share (1 − β)(λ_rel − 1) an update, whatever the gradient does.

    Three cases that the paper leaves open: a norm of zero, as LoRA's A has it at first, says nothing and is not
    remembered, or its parameter would be clipped to zero for ever; a parameter that gets its first gradient after the
    warm-up is clipped in that update as in the warm-up; non-finite norms are never remembered.
    """

    lambda_rel: float = 1.04
    """λ_rel, from 1: the largest ratio of a norm to its average that is left alone."""
    lambda_abs: float = 1.0
    """λ_abs: the limit of the total norm during the warm-up."""
    beta: float = 0.99
    """β, from 0 to below 1: how much of the average an update keeps."""
    warmup_steps: int = 100
    """Updates that are clipped as a whole."""
    updates: int = field(default=0, init=False)
    """Updates seen so far."""
    averages: dict[str, float] = field(default_factory=dict, init=False)
    """γ_i by parameter name."""

    def __post_init__(self) -> None:
        if not self.lambda_rel >= 1:
            raise ValueError(f"lambda_rel={self.lambda_rel} must be at least 1, or every average would shrink to zero")
        check_above_zero(lambda_abs=self.lambda_abs)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta} must be from 0 to below 1")
        check_whole(1, warmup_steps=self.warmup_steps)

    def clip(self, gradient: Gradient) -> HostClip | None:
        """See `ClipPolicy`."""
        if not gradient.is_clippable:
            return None
        seen = np.flatnonzero(gradient.norms > 0)
        norms = gradient.norms[seen]
        names = [gradient.names[index] for index in seen.tolist()]
        averages = np.array([self.averages.get(name, np.inf) for name in names])
        whole = min(1.0, self.lambda_abs / gradient.total_norm)
        self.updates += 1
        if self.updates <= self.warmup_steps:
            self._remember(names, np.minimum(averages, whole * norms))
            return HostClip.whole(gradient, self.lambda_abs)
        is_known = np.isfinite(averages)
        averages = np.where(is_known, averages, whole * norms)
        factors = np.where(is_known, np.minimum(1.0, self.lambda_rel * averages / norms), whole)
        clipped = factors * norms
        self._remember(names, self.beta * averages + (1 - self.beta) * clipped)
        worst = int(np.argmin(factors))
        if factors[worst] >= 1:
            return None
        found = Outcome(factors.item(worst), norms.item(worst), clipped.item(worst), parameter=seen.item(worst))
        everywhere = np.ones(len(gradient.names))
        everywhere[seen] = factors
        return HostClip(everywhere.tolist(), found)

    def state_dict(self) -> dict[str, Any]:
        """See `ClipPolicy`."""
        return {"updates": self.updates, "averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ClipPolicy`."""
        self.updates = state["updates"]
        self.averages = dict(state["averages"])

    def _remember(self, names: list[str], averages: NDArray[np.float64]) -> None:
        self.averages.update(zip(names, averages.tolist(), strict=True))
