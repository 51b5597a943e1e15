"""A gate on the residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradguard.patch.anatomy import Branch
from hf_gradguard.patch.residual.gtrxl import GTrXLGate, GTrXLPatch
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import rules


@rules.register("input_gate")
@dataclass(frozen=True)
class InputPatch(GTrXLPatch):
    """σ(W·x) ⊙ x + y. See `GTrXLPatch`.

    It has no bias, so that at first about half of x goes on past each branch: not for deep models, and here for
    comparison.
    """

    summary = "σ(W·x) ⊙ x + y: x decides how much of itself goes on"

    def _gate(self, branch: Branch) -> InputGate:
        return InputGate(branch.output.out_features, self.relu)


class InputGate(GTrXLGate):
    """See `InputPatch`.

    Args:
        width: features of x and y.
        relu: whether y goes through a ReLU first.
    """

    def __init__(self, width: int, relu: bool = True) -> None:
        super().__init__(relu)
        self.from_x = stacked(1, width, width)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """See `InputPatch`."""
        return torch.sigmoid(self.from_x(x)) * x + y
