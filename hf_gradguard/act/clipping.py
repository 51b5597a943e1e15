"""Clipping. So far only the Trainer's own, done with fewer passes over the gradients and the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_gradguard.observe.norms import Measurement

# torch divides by the norm plus this.
_EPSILON = 1e-6
# torch's float32 norm can lie above the true one by rounding, far less than this.
_MARGIN = 0.01


def trainers_own(
    measurement: Measurement,
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    total_norm: float | None,
    stock: Callable[[], Tensor | None],
) -> tuple[Tensor | None, float | None]:
    """Clips as `torch.nn.utils.clip_grad_norm_` would, bit for bit, but multiplies only where that changes anything.

    Args:
        measurement: of all these gradients.
        parameters: whose gradients to clip.
        max_norm: the limit; infinity where only the norm is wanted.
        total_norm: what is known of the total norm on the host, None where reading it would mean a wait.
        stock: what the Trainer would have called.

    Returns:
        The total norm before clipping, as the Trainer would find it or better, and the coefficient that gradients were
        multiplied with where that is known.
    """
    if total_norm is not None and math.isfinite(total_norm) and total_norm * (1 + _MARGIN) + _EPSILON <= max_norm:
        return torch.tensor(total_norm), 1.0
    if measurement.stock_total is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, measurement.stock_total)
        found: Tensor | None = measurement.stock_total
    else:
        found = stock()
    return found, None if total_norm is None else min(1.0, max_norm / (total_norm + _EPSILON))
