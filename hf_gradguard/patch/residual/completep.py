"""CompleteP, and depth-µP: a constant gain by depth, with learning rates and epsilons to match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, rules


@rules.register("completep")
@dataclass(frozen=True)
class CompleteP(MultiplierPatch):
    """x + m^−α · y with m = N ÷ base_depth.

    WIP
    """

    summary = "x + m^−α·y, m = N ÷ base depth; learning rates and epsilon scaled by param_groups"
    citation = "Dey et al. 2025, arXiv 2505.01618; α = ½: Yang et al. 2023, arXiv 2310.02244"
    norm = "pre"

    base_depth: int = 1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_whole(1, base_depth=self.base_depth)
        check_above_zero(alpha=self.alpha)

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        return lambda branch: Multiplier(float((branch.depth / self.base_depth) ** -self.alpha), learnable=False)
