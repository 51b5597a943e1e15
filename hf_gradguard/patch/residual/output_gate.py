"""A gate on the branch's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_gradguard.patch.residual.gtrxl import GTrXLGate, GTrXLPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import check_finite, rules


@rules.register("output_gate")
@dataclass(frozen=True)
class OutputPatch(GTrXLPatch):
    """x + σ(W·x − b_g) ⊙ y. See `GTrXLPatch`.

    b_g is learned; the paper gives its start for the GRU gate, and this one has the same. With a very negative b_g and
    `relu=false` the gate is open and the model nearly what it was.
    """

    summary = "x + σ(W·x − b) ⊙ y: x decides how much of y is let in"

    bias: float = 2.0
    """b_g at first; the larger, the less of y is let in."""

    def __post_init__(self) -> None:
        check_finite(bias=self.bias)

    def _gate(self, width: int) -> OutputGate:
        return OutputGate(width, self.bias, self.relu)


class OutputGate(GTrXLGate):
    """See `OutputPatch`.

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
        """See `OutputPatch`."""
        return x + torch.sigmoid(self.from_x(x) - self.bias) * y
