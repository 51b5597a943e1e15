"""A small gain for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, check_finite, rules


@rules.register("layerscale")
@dataclass(frozen=True)
class LayerScale(MultiplierPatch):
    """x + λ ⊙ y with a learned λ [width] for each branch.

    Hugo Touvron, Matthieu Cord, Alexandre Sablayrolles, Gabriel Synnaeve, Hervé Jégou 2021, "Going deeper with image
    transformers", arXiv 2103.17239, section 2. λ begins at 0.1 in models of up to 18 layers, at 1e-5 with 24 and at
    1e-6 in deeper ones. What 19 to 23 layers get the paper does not say; here it is 1e-5. Layers are counted in the
    branch's own stack.
    """

    summary = "x + λ ⊙ y, a learned λ a channel, small at first"
    citation = "Touvron et al. 2021, arXiv 2103.17239"
    norm = "pre"

    init: float | None = None
    """λ at first, by default that of the paper for the model's depth; 1 keeps a model's function."""

    def __post_init__(self) -> None:
        if self.init is not None:
            check_finite(init=self.init)

    @property
    def preserving(self) -> bool:
        """See `ResidualPatch`."""
        return self.init == 1

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        return lambda branch: Multiplier(torch.full((branch.output.out_features,), self._start(branch.depth)))

    def _start(self, depth: int) -> float:
        if self.init is not None:
            return self.init
        return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
