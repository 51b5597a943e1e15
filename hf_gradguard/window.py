"""What is known so far of the window under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_gradguard.act.accumulation import Taken
from hf_gradguard.act.clipping import Clip
from hf_gradguard.act.nonfinite import Decision
from hf_gradguard.observe.norms import HostCopy, Measurement
from hf_gradguard.observe.reading import Reading
from hf_gradguard.observe.weights import WeightProbe


@dataclass
class WindowUnderWay:
    """Filled from the first forward pass to the end of the optimizer's step; each window has its own."""

    micro_batches: int = 0
    loss: Tensor | None = None
    loss_copy: HostCopy | None = None
    weights: list[Tensor | float | None] = field(default_factory=list)
    """Target tokens of each micro-batch on this process."""
    weight_copy: HostCopy | None = None
    partial: list[Measurement] = field(default_factory=list)
    """Of the gradients as they were after each micro-batch but the last."""
    measurement: Measurement | None = None
    is_final: bool = False
    """Whether the measurement is that of the gradients which the optimizer is to use."""
    reading: Reading | None = None
    decision: Decision | None = None
    has_acted: bool = False
    taken: Taken | None = None
    makes_update: bool = True
    """Whether the optimizer finds a gradient to step with."""
    bypasses_scaler: bool = False
    """Whether the update is of earlier windows, in one that overflowed, which the scaler would skip."""
    total_norm: float | None = None
    """Of that gradient, before clipping."""
    clip: Clip | None = None
    has_clipped: bool = False
    """Whether the Trainer's own clipping has been called."""
    max_norm: float | None = None
    """The limit of the Trainer's own clipping, where that is in use."""
    coefficient: float | None = None
    probe: WeightProbe | None = None
    updated: bool = True
