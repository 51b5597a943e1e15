"""Where a gradient that is not finite began: parameter, layer, micro-batch and, where it can be run again, module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_gradguard.observe.norms import Measurement
from hf_gradguard.observe.origin import MicroBatch, Origin
from hf_gradguard.observe.reading import Reading
from hf_gradguard.observe.replay import Replays


@dataclass(frozen=True)
class Fault:
    """A gradient that is not finite, traced back as far as is possible."""

    parameter: str
    """The parameter nearest to the origin."""
    layer: str
    """Its layer."""
    value: float
    """The norm of its gradient: NaN or infinity."""
    others: int
    """How many more parameters have such a gradient."""
    micro_batch: int | None
    """The first micro-batch after which it was there, from 0; None where only the whole window could be seen."""
    replayed: MicroBatch | None = None
    """The micro-batch, where it was run again."""
    origin: Origin | None = None
    """What was found when it was run again."""


def find_fault(reading: Reading, partial: Sequence[Measurement], micro_batches: int, replays: Replays) -> Fault:
    """Traces a window's non-finite gradient.

    Args:
        reading: of the window.
        partial: of the gradients as they were after each micro-batch but the last, as far as they were measured.
        micro_batches: how many the window had.
        replays: of the window's micro-batches.
    """
    norms, micro_batch = reading.parameter_norms, len(partial) if len(partial) + 1 == micro_batches else None
    for index, measurement in enumerate(partial):
        if not np.all(np.isfinite(measurement.norms())):
            norms, micro_batch = measurement.norms(), index
            break
    found = None if micro_batch is None else replays.trace(micro_batch)
    replayed, origin = (None, None) if found is None else found
    bad = np.flatnonzero(~np.isfinite(norms))
    parameters = reading.layout.parameters
    module = None if origin is None else origin.module
    nearest = int(bad[_nearest([parameters[index].name for index in bad], module)])
    return Fault(
        parameter=parameters[nearest].name,
        layer=reading.layout.groups[parameters[nearest].group].name,
        value=float(norms[nearest]),
        others=len(bad) - 1,
        micro_batch=micro_batch,
        replayed=replayed,
        origin=origin,
    )


def _nearest(names: Sequence[str], module: str | None) -> int:
    """Index of the parameter nearest to the origin: in the module that made the fault, or in the smallest module around
    it that has a bad one. The backward pass meets parameters from the last to the first: of several it is the last."""
    around = module
    while around:
        if within := [index for index, name in enumerate(names) if name.startswith(f"{around}.")]:
            return within[-1]
        around = around.rpartition(".")[0]
    return len(names) - 1
