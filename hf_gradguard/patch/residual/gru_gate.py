"""The gate of a GRU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradguard.patch.residual.gtrxl import BiasedGate, BiasedPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import rules


class GRUGate(BiasedGate):
    """See `GRUPatch`."""

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(width, bias, relu)
        self.from_y = stacked(3, width, width)
        """W_r, W_z and W_g."""
        self.from_x = stacked(2, width, width)
        """U_r and U_z."""
        self.from_reset = stacked(1, width, width)
        """U_g."""

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `GRUPatch`."""
        reset_y, update_y, candidate_y = self.from_y(y).chunk(3, dim=-1)
        reset_x, update_x = self.from_x(x).chunk(2, dim=-1)
        r = torch.sigmoid(reset_y + reset_x)
        z = torch.sigmoid(update_y + update_x - self.bias)
        h = torch.tanh(candidate_y + self.from_reset(r * x))
        return (1 - z) * x + z * h


@rules.register("gru_gate")
@dataclass(frozen=True)
class GRUPatch(BiasedPatch):
    """(1 − z) ⊙ x + z ⊙ h, where

    r = σ(W_r·y + U_r·x), z = σ(W_z·y + U_z·x − b_g), h = tanh(W_g·y + U_g·(r ⊙ x)).

    The gate that the paper found best (see `GTrXLPatch`). x is the state of a GRU that takes a step with each branch;
    b_g, learned, is positive at first and keeps it near the identity. 6·width² + width parameters a branch.
    """

    summary = "(1 − z) ⊙ x + z ⊙ h: x is the state of a GRU, y its input"
    carries = True
    gate = GRUGate
