"""The state of every generator of random numbers that a training step may draw from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Python's, numpy's and torch's random state at one moment, so that what was drawn can be drawn again.

    Of torch, the CPU's and, where CUDA was in use, that of each CUDA device. No device is waited for.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(2))
        True
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: Tensor
    """uint8 `[state]`."""
    cuda: tuple[Tensor, ...]
    """uint8 `[state]` for each device; empty where CUDA was not in use."""

    @classmethod
    def capture(cls) -> RandomState:
        """The state as it is now."""
        # CUDA that nobody has used yet is left asleep: to wake it takes seconds and memory of the device.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Sets all generators back. It can be done any number of times."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
