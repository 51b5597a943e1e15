"""A gate on the branch's output that it makes itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_gradguard.patch.residual.gtrxl import GTrXLGate, GTrXLPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import check_finite, rules


@rules.register("sigmoid_tanh_gate")
@dataclass(frozen=True)
class SigmoidTanhPatch(GTrXLPatch):
    """x + σ(W·y − b_g) ⊙ tanh(U·y). See `GTrXLPatch`.

    b_g is learned; the paper gives its start for the GRU gate, and this one has the same.
    """

    summary = "x + σ(W·y − b) ⊙ tanh(U·y): no channel of a branch adds more than 1"

    bias: float = 2.0
    """b_g at first; the larger, the less is let in."""

    def __post_init__(self) -> None:
        check_finite(bias=self.bias)

    def _gate(self, width: int) -> SigmoidTanhGate:
        return SigmoidTanhGate(width, self.bias, self.relu)


class SigmoidTanhGate(GTrXLGate):
    """See `SigmoidTanhPatch`.

    Args:
        width: features of x and y.
        bias: b_g at first.
        relu: whether y goes through a ReLU first.
    """

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(relu)
        self.from_y = stacked(2, width, width)
        """W and U."""
        self.bias = nn.Parameter(torch.full((width,), float(bias)))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `SigmoidTanhPatch`."""
        gate, value = self.from_y(y).chunk(2, dim=-1)
        return x + torch.sigmoid(gate - self.bias) * torch.tanh(value)
