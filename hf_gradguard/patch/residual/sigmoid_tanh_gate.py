"""A gate on the branch's output that it makes itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradguard.patch.residual.gtrxl import BiasedGate, BiasedPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import rules


class SigmoidTanhGate(BiasedGate):
    """See `SigmoidTanhPatch`."""

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(width, bias, relu)
        self.from_y = stacked(2, width, width)
        """W and U."""

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `SigmoidTanhPatch`."""
        gate, value = self.from_y(y).chunk(2, dim=-1)
        return x + torch.sigmoid(gate - self.bias) * torch.tanh(value)


@rules.register("sigmoid_tanh_gate")
@dataclass(frozen=True)
class SigmoidTanhPatch(BiasedPatch):
    """x + σ(W·y − b_g) ⊙ tanh(U·y). See `GTrXLPatch`."""

    summary = "x + σ(W·y − b) ⊙ tanh(U·y): no channel of a branch adds more than 1"
    gate = SigmoidTanhGate
