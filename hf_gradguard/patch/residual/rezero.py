"""A gain of zero for each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, check_finite, rules


@rules.register("rezero")
@dataclass(frozen=True)
class ReZero(MultiplierPatch):
    """x + α·y with a learned α, 0 at first: every layer begins as the identity.

    Thomas Bachlechner, Bodhisattwa Prasad Majumder, Huanru Henry Mao, Garrison W. Cottrell, Julian McAuley 2020,
    "ReZero is all you need: Fast convergence at large depth", arXiv 2003.04887, equation 2. As in the authors' code,
    all branches of a layer share one α. The paper's Transformer has no norms in its branches; this rule leaves the
    norms as they are.
    """

    summary = "x + α·y, one learned α a layer, 0 at first"
    citation = "Bachlechner et al. 2020, arXiv 2003.04887"
    norm = "none"

    init: float = 0.0
    """α at first; 1 keeps a model's function."""
    shared: bool = True
    """Whether the branches of a layer share one α; else each has its own."""

    def __post_init__(self) -> None:
        check_finite(init=self.init)

    @property
    def preserving(self) -> bool:
        """See `ResidualPatch`."""
        return self.init == 1

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        of_layer: dict[tuple[str, int], Multiplier] = {}

        def make_rule(branch: Branch) -> Multiplier:
            if not self.shared:
                return Multiplier(self.init)
            return of_layer.setdefault((branch.stack, branch.layer), Multiplier(self.init))

        return make_rule
