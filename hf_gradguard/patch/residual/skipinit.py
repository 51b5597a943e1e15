"""A gain of zero for each branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, check_finite, rules


@rules.register("skipinit")
@dataclass(frozen=True)
class SkipInit(MultiplierPatch):
    """x + α·y with a learned α for each branch, 0 at first.

    Soham De, Samuel L. Smith 2020, "Batch normalization biases residual blocks towards the identity function in deep
    networks", arXiv 2002.10444, section 4: α begins at zero or at a constant of at most 1/√d, with d residual branches.
    There it takes the place of batch normalisation in ResNets; this rule leaves the norms as they are.
    """

    summary = "x + α·y, one learned α a branch, 0 at first"
    citation = "De & Smith 2020, arXiv 2002.10444"
    norm = "none"

    init: float = 0.0
    """α at first; 1 keeps a model's function."""

    def __post_init__(self) -> None:
        check_finite(init=self.init)

    @property
    def preserving(self) -> bool:
        """See `ResidualPatch`."""
        return self.init == 1

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        return lambda branch: Multiplier(self.init)
