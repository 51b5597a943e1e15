"""A constant gain for all branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, rules


@rules.register("branch_scale")
@dataclass(frozen=True)
class BranchScale(MultiplierPatch):
    """x + s·y with a constant s, by default 1 ÷ √(number of branches): 1/√(2N) in a stack of N layers, 1/√(3N) with
    cross-attention. The variance of the stream then grows by a factor that does not depend on depth.

    With `exponent` α instead s = (N ÷ base_depth)^−α. α = ½ is depth-µP: Greg Yang, Dingli Yu, Chen Zhu, Soufiane
    Hayou 2023, "Tensor programs VI: Feature learning in infinite-depth neural networks", arXiv 2310.02244. α = 1 is
    CompleteP: Nolan Dey, Bin Claire Zhang, Lorenzo Noci, Mufan Li, Blake Bordelon, Shane Bergsma, Cengiz Pehlevan,
    Boris Hanin, Joel Hestness 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers", arXiv
    2505.01618, table 1, where m_L = N ÷ base_depth. Both also scale learning rates, and CompleteP the optimizer's
    epsilon, which is not part of this rule. An initialisation that shrinks output projections with depth, as GPT-2's
    does, would do the same thing twice.
    """

    summary = "x + s·y, a constant s: 1/√(2N), or N^−α (depth-µP α = ½, CompleteP α = 1)"
    citation = "Yang et al. 2023, arXiv 2310.02244; Dey et al. 2025, arXiv 2505.01618"
    norm = "pre"

    scale: float | None = None
    """s itself, instead of what depth gives; 1 keeps a model's function."""
    exponent: float | None = None
    """α, for s = (N ÷ base_depth)^−α."""
    base_depth: int = 1
    """The depth whose s is 1: that of the small model whose learning rate is to fit the deep one, too."""

    def __post_init__(self) -> None:
        check_whole(1, base_depth=self.base_depth)
        if self.scale is not None:
            check_above_zero(scale=self.scale)
        if self.exponent is not None:
            check_above_zero(exponent=self.exponent)
        if self.scale is not None and self.exponent is not None:
            raise ValueError(f"scale={self.scale} and exponent={self.exponent} both say what s is; give one of them")
        if self.base_depth != 1 and self.exponent is None:
            raise ValueError(
                f"base_depth={self.base_depth} has a meaning only with exponent; add exponent=1 or leave it"
            )

    @property
    def preserving(self) -> bool:
        """See `ResidualPatch`."""
        return self.scale == 1

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        return lambda branch: Multiplier(self._scale(branch), learnable=False)

    def _scale(self, branch: Branch) -> float:
        if self.scale is not None:
            return self.scale
        if self.exponent is not None:
            return float((branch.depth / self.base_depth) ** -self.exponent)
        return 1 / math.sqrt(branch.count)
