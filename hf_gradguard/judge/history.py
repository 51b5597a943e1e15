"""What a judgement looks back on: the last updates, and how large the gradient used to be."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = NDArray[np.float64]

_OPENING = 5
"""Updates whose median is the level that a run began with. Few, as one with an absurd learning rate explodes early."""
_MEMORY = 1000
"""Updates that the long-term average of the total norm reaches back. Many, so that an explosion does not soon become
what is usual."""


@dataclass(frozen=True)
class Probe:
    """What an occasional look at the precision found: shares from 0 to 1 `[layers]`, NaN where unknown."""

    zero_gradients: Row
    """Share of gradient elements that are exactly zero, where gradients pass through 16 bits."""
    stalled_weights: Row
    """Share of weights with a gradient that the update left as they were, where weights are kept in 16 bits."""


class History:
    """The last updates of a run, in a ring that doesn't grow; its whole state is JSON.

    Only updates with a finite gradient are remembered: what an fp16 scaler skips while it finds its scale, or what is
    not finite for another reason, is a matter of its own and must not blur what the gradient usually is.

    Args:
        layers: how many layers each reading has.
        window: how many updates to keep.
    """

    PROBES = 2
    """Probes that are kept. One alone proves nothing: while the learning rate warms up from zero, no update is large
    enough for 16 bits, and LoRA's A has only zeros at the first step."""

    def __init__(self, layers: int, *, window: int = 20) -> None:
        self.layers = layers
        self.window = window
        self.count = 0
        """Updates remembered so far, those that have left the ring included."""
        self.probes: deque[Probe] = deque(maxlen=self.PROBES)
        """The latest probes, oldest first."""
        self._norms = np.full((window, layers), np.nan)
        self._totals = np.full(window, np.nan)
        self._first_logs: list[float] = []
        self._drift = 0.0  # long-term average of log(total norm ÷ opening level)

    def add(self, layer_norms: ArrayLike, total_norm: float) -> bool:
        """Remembers one update.

        Args:
            layer_norms: L2 norm of each layer's gradient `[layers]`, before clipping; NaN for one without a gradient.
            total_norm: L2 norm of all gradients together.

        Returns:
            Whether it was remembered: False where a norm is not finite.

        Raises:
            ValueError: `layer_norms` is not of `layers` numbers.
        """
        row = self._row(layer_norms, "layer_norms")
        if not math.isfinite(total_norm) or np.isinf(row).any():
            return False
        slot = self.count % self.window
        if self.count >= self.window:
            self._let_go(float(self._totals[slot]))
        self._norms[slot] = row
        self._totals[slot] = total_norm
        self.count += 1
        if len(self._first_logs) < _OPENING and total_norm > 0:
            self._first_logs.append(math.log(total_norm))
        return True

    def add_probe(self, zero_gradients: ArrayLike | None = None, stalled_weights: ArrayLike | None = None) -> None:
        """Remembers a look at the precision; the arguments are `Probe`'s fields, None where nothing is known.

        Raises:
            ValueError: an array is not of `layers` numbers.
        """
        unknown = np.full(self.layers, np.nan)
        self.probes.append(
            Probe(
                unknown if zero_gradients is None else self._row(zero_gradients, "zero_gradients").copy(),
                unknown if stalled_weights is None else self._row(stalled_weights, "stalled_weights").copy(),
            )
        )

    @property
    def norms(self) -> NDArray[np.float64]:
        """Layer norms of the updates in the ring `[updates, layers]`, in no particular order."""
        return self._norms[: min(self.count, self.window)]

    @property
    def total_norms(self) -> NDArray[np.float64]:
        """Total norms of the updates in the ring `[updates]`, in no particular order."""
        return self._totals[: min(self.count, self.window)]

    @property
    def usual_norm(self) -> float | None:
        """What the total norm usually is: the larger of the level the run began with (median) and of the long-term
        average of its logarithm, which starts there; None in the first few updates.

        The average takes in an update only when it leaves the ring, so that an explosion does not raise its own
        measure. It alone would not do: fine-tuning ends with a gradient of almost nothing, and a batch that still has
        something to say is then a hundred times the average, and no explosion.
        """
        if len(self._first_logs) < _OPENING:
            return None
        return math.exp(self._opening_log() + max(0.0, self._drift))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON values (NaN as null)."""
        return {
            "count": self.count,
            "norms": [_to_json(row) for row in self.norms],
            "totals": _to_json(self.total_norms),
            "probes": [
                {"zero_gradients": _to_json(probe.zero_gradients), "stalled_weights": _to_json(probe.stalled_weights)}
                for probe in self.probes
            ],
            "first_logs": list(self._first_logs),
            "drift": self._drift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where the history that gave `state` was.

        Raises:
            ValueError: `state` is of another number of layers or another window.
        """
        norms = [_from_json(row) for row in state["norms"]]
        if any(len(row) != self.layers for row in norms) or len(norms) != min(state["count"], self.window):
            raise ValueError(
                f"saved history of {len(norms)} updates × {len(norms[0]) if norms else 0} layers does not fit one of "
                f"{self.window} × {self.layers}; start with a new one"
            )
        self.count = state["count"]
        self._norms[: len(norms)] = np.array(norms).reshape(len(norms), self.layers)
        self._totals[: len(norms)] = _from_json(state["totals"])
        self.probes.clear()
        self.probes.extend(
            Probe(_from_json(probe["zero_gradients"]), _from_json(probe["stalled_weights"]))
            for probe in state["probes"]
        )
        self._first_logs = list(state["first_logs"])
        self._drift = state["drift"]

    def _let_go(self, total_norm: float) -> None:
        if total_norm > 0:
            self._drift += (math.log(total_norm) - self._opening_log() - self._drift) / _MEMORY

    def _opening_log(self) -> float:
        return statistics.median(self._first_logs)

    def _row(self, values: ArrayLike, name: str) -> Row:
        row = np.asarray(values, dtype=np.float64)
        if row.shape != (self.layers,):
            raise ValueError(f"{name} has shape {row.shape}, expected one number for each of {self.layers} layers")
        return row


def _to_json(row: Row) -> list[float | None]:
    return [None if value != value else value for value in row.tolist()]


def _from_json(values: Sequence[float | None]) -> Row:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
