"""The gate of a highway network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_gradguard.patch.residual.gtrxl import GTrXLGate, GTrXLPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import check_finite, rules


@rules.register("highway_gate")
@dataclass(frozen=True)
class HighwayPatch(GTrXLPatch):
    """c ⊙ x + (1 − c) ⊙ y, where c = σ(W·x + b_g). See `GTrXLPatch`.

    b_g is learned; the paper gives its start for the GRU gate, and this one has the same.
    """

    summary = "c ⊙ x + (1 − c) ⊙ y with c = σ(W·x + b): each channel carries x or takes y"
    carries = True

    bias: float = 2.0
    """b_g at first; the larger, the more of x goes on."""

    def __post_init__(self) -> None:
        check_finite(bias=self.bias)

    def _gate(self, width: int) -> HighwayGate:
        return HighwayGate(width, self.bias, self.relu)


class HighwayGate(GTrXLGate):
    """See `HighwayPatch`.

    Args:
        width: features of x and y.
        bias: b_g at first.
        relu: whether y goes through a ReLU first.
    """

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(relu)
        self.from_x = stacked(1, width, width)
        self.bias = nn.Parameter(torch.full((width,), float(bias)))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `HighwayPatch`."""
        carry = torch.sigmoid(self.from_x(x) + self.bias)
        return carry * x + (1 - carry) * y
