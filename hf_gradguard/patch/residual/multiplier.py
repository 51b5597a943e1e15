"""A gain on a branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Multiplier(nn.Module):
    """x + g · y.

    Args:
        gain: one number, or one for each channel, [width]; the start value where it is learned. A learned number gets
            the shape [1], as FSDP2 shards no scalars. A fixed one stays a Python float, so that it is exact in every
            dtype and needs no place in the checkpoint.
        learnable: whether the gain is a parameter.
    """

    gain: Tensor | float

    def __init__(self, gain: float | Tensor = 1.0, *, learnable: bool = True) -> None:
        super().__init__()
        if learnable:
            start = torch.as_tensor(gain, dtype=torch.get_default_dtype())
            self.gain = nn.Parameter(start.reshape(-1).clone())
        elif isinstance(gain, Tensor):
            self.register_buffer("gain", gain.clone())
        else:
            self.gain = float(gain)

    def scale(self, y: Tensor) -> Tensor:
        """See `Scaling`."""
        return self.gain * y
