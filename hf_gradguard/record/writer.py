"""Writes the record of a run. Nothing that happens to the disk in the middle of a run reaches training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import ROUTINE, Event
from hf_gradguard.record import files
from hf_gradguard.record.groups import group_norms, group_updates
from hf_gradguard.record.stream import (
    Ragged,
    StreamWriter,
    accumulation_schema,
    time_profiles_schema,
    weights_schema,
    windows_schema,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_gradguard.observe.layout import Layout
    from hf_gradguard.observe.reach import TimeProfile

_logger = logging.getLogger(__name__)

_BYTES_A_NORM = 4
_BYTES_A_WINDOW = 64
_BYTES_AN_ACCUMULATION = 48
_BYTES_A_RUN = 64_000 - 4_000
"""What a run may take beside its windows, less what closing it may need: a last flush of all tables and `end.json`."""
_BYTES_A_FLUSH = 1_100
"""Upper bound of the frame that Arrow puts around one batch."""
_BUFFERED_WINDOWS = 64
_BUFFERED_BYTES = 4_000_000
_LEAST_BUFFERED_WINDOWS = 16
_to_json = json.JSONEncoder(separators=(",", ":")).encode
BYTES_A_LEVEL = 128_000_000
"""How much `record_every="auto"` writes before it doubles the interval."""


@dataclass
class Window:
    """One row of the record: what is known after a window."""

    step: int
    """The Trainer's `global_step` at the end of the window, 1 for the first."""
    loss: float | None
    """Mean loss of the window."""
    learning_rate: float | None
    """Of the first parameter group, at the update."""
    total_norm: float
    """L2 norm of the whole gradient, before clipping."""
    norms: NDArray[np.float64]
    """L2 norm of each parameter's gradient, `[parameters]`; −1 where a parameter had none, NaN or inf as found."""
    clip_coefficient: float | None
    """What the gradients were multiplied with, 1.0 where nothing was clipped; None where unknown."""
    updated: bool
    """Whether the optimizer made an update: False where the window was skipped or deferred."""
    seconds: float
    """Time since the segment's start."""


@dataclass(frozen=True, slots=True)
class AccumulationRow:
    """What is held back after a window, where a policy decides when the optimizer steps; in a dry run what would be."""

    step: int
    """Of the window."""
    windows: int
    """Windows held, this one included."""
    weight: float
    """Target tokens held (micro-batches where there are no labels)."""
    accumulated_norm: float
    """L2 norm of the held gradient as an update would use it, before clipping."""
    noise_scale: float
    """Smoothed estimate of the gradient noise scale, in the unit of `weight`; NaN while unknown."""
    updated: bool
    """Whether the policy let the optimizer step with it."""


class RecordWriter:
    """Appends one segment to the record in `directory`. Nothing of the segments before it is touched.

    Windows, and the events of routine kinds, are held back until `flush_seconds` have passed or the buffer (64 windows
    or 4 MB) is full; other events are written at once. What was written survives a kill at once; it is not forced to
    the disk, so a power cut may cost a little more.

    An error of the disk after the start is logged once; the writer then records nothing more and raises nothing.

    Args:
        directory: of the whole record, usually `<output_dir>/gradguard`; made if missing.
        layout: of the parameters whose norms will come.
        run: facts to keep in `run.json`.
        start_step: the step after which the segment starts. Rows of earlier segments beyond it are superseded.
        record_every: keep the norm of every parameter each so many windows, of every group in the others. `auto`: in
            all of them until 128 MB have been written, then in every 2nd until 128 MB more, and so on.
        flush_seconds: longest time that a window is held back, where the size limit allows.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        run: dict[str, Any],
        *,
        start_step: int = 0,
        record_every: int | Literal["auto"] = "auto",
        flush_seconds: float = 2.0,
    ) -> None:
        facts = run | {"format": files.FORMAT, "start_step": start_step}
        try:
            self.path = _new_segment(directory)
            self._spent = files.write_layout(self.path / files.LAYOUT, layout)
            self._spent += files.write_json(self.path / files.RUN, facts)
        except OSError as error:
            raise OSError(
                f"the record can't be written to {directory} ({error}); give an output directory with room that can be "
                "written to, or turn the record off with record=False"
            ) from error
        self._layout = layout
        self._facts = facts
        self._adapts = record_every == "auto"
        self._every = 1 if record_every == "auto" else record_every
        self._level_bytes = 0
        self._flush_seconds = flush_seconds
        self._flushed_at = time.monotonic()
        self._windows = 0
        self._is_open = True
        self._is_closed = False
        self._failure = ""
        self._scalars: list[tuple[float | None, ...]] = []
        self._norms = np.empty((_buffer_size(len(layout.parameters)), len(layout.parameters)), np.float32)
        self._detailed = np.zeros(len(self._norms), np.bool_)
        self._weights: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []
        self._accumulations: list[AccumulationRow] = []
        self._accumulated = 0
        self._schemas = {
            files.WINDOWS: windows_schema(),
            files.WEIGHTS: weights_schema(),
            files.ACCUMULATION: accumulation_schema(),
            files.TIME_PROFILES: time_profiles_schema(),
        }
        self._streams: dict[str, StreamWriter] = {}
        self._events: FileIO | None = None
        self._lines: list[bytes] = []

    def start_at(self, step: int) -> None:
        """Makes this segment one that starts after another step, before its first window: for a run that learns only
        now that it goes on from a checkpoint."""
        if not self._is_open or self._windows:
            return
        try:
            files.write_json(self.path / files.RUN, self._facts | {"start_step": step})
        except OSError as error:
            self._give_up(error)

    def window(self, row: Window) -> None:
        """Adds one window, and writes what is held back if that is due."""
        if not self._is_open:
            return
        position = len(self._scalars)
        with np.errstate(over="ignore"):
            self._norms[position] = row.norms
        self._detailed[position] = self._takes_detail()
        self._scalars.append(
            (row.step, row.loss, row.learning_rate, row.total_norm, row.clip_coefficient, row.seconds, row.updated)
        )
        self._windows += 1
        if position + 1 == len(self._norms) or (self._is_due() and self._is_affordable()):
            self.flush()

    def weights(self, step: int, norms: NDArray[np.float64], update_ratios: NDArray[np.float64]) -> None:
        """Adds what was measured of the weights; it is written with the next windows.

        Args:
            step: of the window.
            norms: L2 norm of each weight before the update, `[parameters]`.
            update_ratios: norm of each weight's update ÷ norm of the weight, `[parameters]`; NaN where unknown.
        """
        if self._is_open:
            self._weights.append((step, *group_updates(self._layout, norms, update_ratios)))

    def accumulation(self, row: AccumulationRow) -> None:
        """Adds what is held back after a window; it is written with the next windows, so tell it before `window`."""
        if self._is_open:
            self._accumulations.append(row)
            self._accumulated += 1

    def time_profile(self, step: int, profile: TimeProfile) -> None:
        """Writes a time profile at once, without the norms that it was made of.

        Args:
            step: of the window in which it was measured.
            profile: what was measured.
        """
        if not self._is_open:
            return
        try:
            self._stream(files.TIME_PROFILES).append(_time_profile_columns(step, profile))
        except OSError as error:
            self._give_up(error)

    def event(self, event: Event) -> None:
        """Writes one event at once, or with the next windows if it is of a routine kind."""
        if not self._is_open:
            return
        self._lines.append(_to_json(event.to_dict()).encode() + b"\n")
        if event.kind in ROUTINE:
            return
        self._spent += len(self._lines[-1])
        try:
            self._write_events()
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Writes all that is held back."""
        if not self._is_open:
            return
        try:
            if self._scalars:
                self._append(files.WINDOWS, self._window_columns())
            if self._weights:
                self._append(files.WEIGHTS, self._weight_columns())
            if self._accumulations:
                self._append(files.ACCUMULATION, self._accumulation_columns())
            if self._lines:
                self._write_events()
        except OSError as error:
            self._give_up(error)
        self._scalars.clear()
        self._weights.clear()
        self._accumulations.clear()
        self._flushed_at = time.monotonic()

    def close(self, status: str, message: str = "") -> None:
        """Writes all that is held back and how the attempt ended; calling it again does nothing.

        Args:
            status: `finished`, `failed`, `stopped` or `interrupted`; `continued` where another segment follows in the
                same training.
            message: a plain sentence for people.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.flush()
        try:
            self._close_files()
            note = f"not recorded to the end: {self._failure}" if self._failure else ""
            text = "; ".join(part for part in (message, note) if part)
            files.write_json(self.path / files.END, {"status": status, "message": text})
        except OSError as error:
            self._give_up(error)
        self._is_open = False

    def _takes_detail(self) -> bool:
        if self._windows % self._every:
            return False
        self._level_bytes += _BYTES_A_NORM * self._norms.shape[1]
        if self._adapts and self._level_bytes >= BYTES_A_LEVEL:
            self._every *= 2
            self._level_bytes = 0
        return True

    def _is_due(self) -> bool:
        return time.monotonic() - self._flushed_at >= self._flush_seconds

    def _is_affordable(self) -> bool:
        """Whether the record keeps within its size if it is written now, even where nothing can be compressed."""
        held, groups = len(self._scalars), len(self._layout.groups)
        norms = np.where(self._detailed[:held], self._norms.shape[1], groups).sum() + 2 * groups * len(self._weights)
        frames = _BYTES_A_FLUSH * (1 + bool(self._weights) + bool(self._accumulations))
        cost = _BYTES_A_NORM * norms + _BYTES_A_WINDOW * (held + len(self._weights)) + frames
        cost += _BYTES_AN_ACCUMULATION * len(self._accumulations)
        allowed = _BYTES_A_RUN + self._windows * (_BYTES_A_WINDOW + _BYTES_A_NORM * self._norms.shape[1])
        allowed += _BYTES_AN_ACCUMULATION * self._accumulated
        return bool(self._spent + cost <= allowed)

    def _window_columns(self) -> dict[str, NDArray[Any] | Ragged]:
        rows = np.array(self._scalars, dtype=np.float64)
        norms, detailed = self._norms[: len(rows)], self._detailed[: len(rows)]
        step, loss, learning_rate, total_norm, clip_coefficient, seconds, updated = rows.T
        return {
            "step": step.astype(np.int64),
            "loss": loss,
            "learning_rate": learning_rate,
            "total_norm": total_norm,
            "clip_coefficient": clip_coefficient,
            "seconds": seconds,
            "updated": updated.astype(np.bool_),
            "norms": (norms[detailed], detailed),
            "group_norms": (_to_float32(group_norms(self._layout, norms[~detailed])), ~detailed),
        }

    def _weight_columns(self) -> dict[str, NDArray[Any] | Ragged]:
        steps, norms, ratios = zip(*self._weights, strict=True)
        everywhere = np.ones(len(steps), np.bool_)
        return {
            "step": np.array(steps, np.int64),
            "weight_norms": (_to_float32(np.stack(norms)), everywhere),
            "update_ratios": (_to_float32(np.stack(ratios)), everywhere),
        }

    def _accumulation_columns(self) -> dict[str, NDArray[Any] | Ragged]:
        return {
            field.name: np.array([getattr(row, field.name) for row in self._accumulations])
            for field in dataclasses.fields(AccumulationRow)
        }

    def _write_events(self) -> None:
        lines, self._lines = b"".join(self._lines), []
        if self._events is None:
            self._events = (self.path / files.EVENTS).open("xb", buffering=0)
        write_all(self._events, lines)

    def _append(self, name: str, columns: Mapping[str, NDArray[Any] | Ragged]) -> None:
        self._spent += self._stream(name).append(columns)

    def _stream(self, name: str) -> StreamWriter:
        if name not in self._streams:
            self._streams[name] = StreamWriter(self.path / name, self._schemas[name])
        return self._streams[name]

    def _give_up(self, error: OSError) -> None:
        if self._failure:
            return
        self._failure = str(error)
        self._is_open = False
        _logger.warning(
            "the record %s can't be written any more (%s): training goes on unrecorded; make room on the disk, or give "
            "another record_dir, before the next run",
            self.path,
            error,
        )
        with contextlib.suppress(OSError):
            self._close_files()

    def _close_files(self) -> None:
        streams, self._streams = self._streams, {}
        with contextlib.ExitStack() as stack:
            for stream in streams.values():
                stack.callback(stream.close)
            if self._events is not None:
                stack.callback(self._events.close)


def _new_segment(directory: Path) -> Path:
    """Makes the directory of the next segment, also where another process makes one at the same moment."""
    directory.mkdir(parents=True, exist_ok=True)
    taken = files.segment_paths(directory)
    number = int(taken[-1].name.removeprefix("segment-")) + 1 if taken else 0
    while True:
        path = files.segment_path(directory, number)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _time_profile_columns(step: int, profile: TimeProfile) -> dict[str, NDArray[Any] | Ragged]:
    low, middle, high = profile.quantiles.T
    return {
        "step": np.full(len(profile.lags), step, np.int64),
        "lag": profile.lags,
        "mean": profile.mean,
        "low": low,
        "middle": middle,
        "high": high,
        "zero_share": profile.zero_share,
        "samples": profile.samples,
    }


def _buffer_size(parameters: int) -> int:
    fitting = _BUFFERED_BYTES // (_BYTES_A_NORM * max(parameters, 1))
    return min(_BUFFERED_WINDOWS, max(_LEAST_BUFFERED_WINDOWS, fitting))


def _to_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
