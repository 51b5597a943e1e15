"""A gate on the branch's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradguard.patch.residual.gtrxl import BiasedGate, BiasedPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import rules


class OutputGate(BiasedGate):
    """See `OutputPatch`."""

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(width, bias, relu)
        self.from_x = stacked(1, width, width)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `OutputPatch`."""
        return x + torch.sigmoid(self.from_x(x) - self.bias) * y


@rules.register("output_gate")
@dataclass(frozen=True)
class OutputPatch(BiasedPatch):
    """x + σ(W·x − b_g) ⊙ y. See `GTrXLPatch`.

    With a very negative b_g and `relu=false` the gate is open and the model nearly what it was.
    """

    summary = "x + σ(W·x − b) ⊙ y: x decides how much of y is let in"
    gate = OutputGate
