"""What a residual rule is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class Gate(Protocol):
    """An nn.Module that decides what becomes of x and y; the stream goes on with its answer instead of x + y.

    One gate serves one addition: in a layer with parallel residual, y is the sum of attention and MLP.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Joins a branch to the stream.

        Args:
            x: the residual, [..., width].
            y: the branch's output after dropout, of the same shape.

        Returns:
            What takes the place of x + y, of the same shape: the next x, or in a post-norm model what the norm gets.
        """


class Scaling(Protocol):
    """An nn.Module that changes the branch's output alone: the stream goes on with x + scale(y).

    One serves one branch, also in a layer with parallel residual. It needs no x, so it costs less than a gate, can be
    compiled together with gradient checkpointing, and, where constant and linear in y, folds into the branch's output.
    """

    def scale(self, y: Tensor) -> Tensor:
        """The branch's output [..., width], after dropout, as it will be added to x."""


Rule = Gate | Scaling
"""Either of the two; a module whose class has a method `scale` counts as a scaling."""


@runtime_checkable
class NormAdjusting(Protocol):
    """What a rule has, beside the above, that needs other settings of the norm its addition goes into."""

    def norm_settings(self, norm: nn.Module) -> dict[str, float]:
        """Attributes of the norm with the values that they have while the rule is on the model."""
