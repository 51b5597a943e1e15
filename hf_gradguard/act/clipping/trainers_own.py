"""The Trainer's own clipping, done with fewer passes over the gradients and the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# torch divides by the norm plus this.
_EPSILON = 1e-6
# torch's float32 norm can lie above the true one by rounding, far less than this.
_MARGIN = 0.01


def stock_coefficient(max_norm: float, total_norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplies a gradient of this norm with."""
    return min(1.0, max_norm / (total_norm + _EPSILON))


def trainers_own(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    total_norm: float | None,
    stock: Callable[[], Tensor | None],
    stock_total: Tensor | None,
) -> Tensor | None:
    """Clips as `torch.nn.utils.clip_grad_norm_` would, bit for bit, but multiplies only where that changes anything.

    Args:
        parameters: whose gradients to clip.
        max_norm: the limit; infinity where only the norm is wanted.
        total_norm: what is known of the total norm on the host, None where reading it would mean a wait.
        stock: what the Trainer would have called.
        stock_total: the total norm as torch itself finds it, bit for bit, where a measurement has it.

    Returns:
        The total norm before clipping, as the Trainer would find it or better.
    """
    if total_norm is not None and math.isfinite(total_norm) and total_norm * (1 + _MARGIN) + _EPSILON <= max_norm:
        return torch.tensor(total_norm)
    if stock_total is None:
        return stock()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, stock_total)
    return stock_total
