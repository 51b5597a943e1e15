"""How large the weights are, how far one update moves them, and whether their precision can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard import backends
from hf_gradguard.backends.dtensor import local_part

SAMPLE = 1 << 16
"""Elements of a tensor that are compared before and after an update; larger tensors are sampled at an even stride, so
that a probe of a model of any size needs little memory."""
_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WeightReading:
    """One update, seen from the weights. Every field is float64 `[parameters]`, NaN where it does not apply."""

    norms: NDArray[np.float64]
    """L2 norm of each weight before the update."""
    update_ratios: NDArray[np.float64]
    """Norm of the update ÷ norm of the weight (over the sample)."""
    zero_share: NDArray[np.float64]
    """Share of the gradient's elements that are exactly zero, where it passed through fp16 or is kept in 16 bits."""
    stalled_share: NDArray[np.float64]
    """Share of the elements with a gradient whose weight did not change, where the weight is kept in 16 bits."""


class WeightProbe:
    """Compares the weights before and after one update: make it before `optimizer.step()`, `finish()` it after.

    Args:
        parameters: the weights, with their gradients.
        through_fp16: whether gradients passed through fp16 (mixed precision), where small ones become zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, through_fp16: bool = False) -> None:
        self._parameters = parameters
        self._before = [_sample(parameter.detach()).clone() for parameter in parameters]
        self._gradients = [
            None if parameter.grad is None or parameter.grad.is_sparse else _sample(parameter.grad).ne(0)
            for parameter in parameters
        ]
        self._counts_zeros = [
            through_fp16 or (parameter.grad is not None and parameter.grad.dtype in _LOW_PRECISION)
            for parameter in parameters
        ]
        self._squares, _ = backends.squared_norms([parameter.detach() for parameter in parameters])

    @torch.no_grad()
    def finish(self) -> WeightReading:
        """What the update did. Waits for the device."""
        ratios, zeros, stalled = [], [], []
        for parameter, before, has_gradient, counts_zeros in zip(
            self._parameters, self._before, self._gradients, self._counts_zeros, strict=True
        ):
            after = _sample(parameter.detach())
            moved = torch.linalg.vector_norm(after - before, dtype=torch.float64)
            ratios.append(moved / torch.linalg.vector_norm(before, dtype=torch.float64))
            nothing = torch.full_like(moved, torch.nan)
            zeros.append(1 - has_gradient.double().mean() if has_gradient is not None and counts_zeros else nothing)
            low = has_gradient is not None and parameter.dtype in _LOW_PRECISION
            stalled.append((after == before)[has_gradient].double().mean() if low else nothing)
        return WeightReading(np.sqrt(_to_host(self._squares)), *(_stack(values) for values in (ratios, zeros, stalled)))


def _sample(tensor: Tensor) -> Tensor:
    flat = local_part(tensor).reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)] if flat.numel() > SAMPLE else flat


def _stack(values: Sequence[Tensor]) -> NDArray[np.float64]:
    return _to_host(torch.stack([value.to(values[0].device) for value in values]))


def _to_host(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.cpu().numpy()
    return found
