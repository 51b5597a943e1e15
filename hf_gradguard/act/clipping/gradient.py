"""What a clipping rule looks at: the gradient that the optimizer is about to use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_gradguard.act.clipping.units import Units
from hf_gradguard.observe.norms import NO_GRADIENT


@dataclass(frozen=True)
class Gradient:
    """The gradient of one update, with its norms on the host, before any clipping."""

    parameters: Sequence[nn.Parameter]
    """The trainable parameters `[P]`; `.grad` is None where one has no gradient."""
    names: Sequence[str]
    """Their names `[P]`."""
    groups: NDArray[np.int64]
    """Index of each parameter's layer in `Layout.groups` `[P]`."""
    norms: NDArray[np.float64]
    """L2 norm of each parameter's gradient `[P]`; `NO_GRADIENT` (−1) where it has none."""
    units: Units
    """What counts as one unit of each parameter, as `read_units` finds it once for a model."""

    @cached_property
    def total_norm(self) -> float:
        """L2 norm of all gradients together; 0 where there is none."""
        return math.hypot(*self.norms[self.norms != NO_GRADIENT].tolist())

    @property
    def is_clippable(self) -> bool:
        """Whether every norm is finite and one of them above zero. Nothing else needs clipping, and no rule may learn
        from it: one NaN would stay in its averages for ever, and a zero would set its threshold to zero."""
        return 0 < self.total_norm < math.inf
