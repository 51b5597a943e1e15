"""What a residual rule asks of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in a model a parameter is, as far as scaling depends on it."""

    depth: int | None
    """Number of layers in the stack that it belongs to; None outside of layers: embeddings, final norms, heads."""
    is_matrix: bool
    """It maps one width to another. False for biases, norms, gains, all embeddings and the output embeddings."""


@dataclass(frozen=True)
class Factors:
    """What the optimizer's options are multiplied with for one parameter."""

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


ScaleOptimizer = Callable[[Place], Factors]
"""The factors for each place of one model."""
