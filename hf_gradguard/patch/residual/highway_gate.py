"""The gate of a highway network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradguard.patch.residual.gtrxl import BiasedGate, BiasedPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import rules


class HighwayGate(BiasedGate):
    """See `HighwayPatch`."""

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(width, bias, relu)
        self.from_x = stacked(1, width, width)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `HighwayPatch`."""
        carry = torch.sigmoid(self.from_x(x) + self.bias)
        return carry * x + (1 - carry) * y


@rules.register("highway_gate")
@dataclass(frozen=True)
class HighwayPatch(BiasedPatch):
    """c ⊙ x + (1 − c) ⊙ y, where c = σ(W·x + b_g). See `GTrXLPatch`."""

    summary = "c ⊙ x + (1 − c) ⊙ y with c = σ(W·x + b): each channel carries x or takes y"
    carries = True
    gate = HighwayGate
