"""Reads the record of a run, also while it is being written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import Event
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.record import files
from hf_gradguard.record.files import RecordError
from hf_gradguard.record.groups import NO_GRADIENT, group_norms
from hf_gradguard.record.stream import (
    accumulation_schema,
    read_stream,
    time_profiles_schema,
    weights_schema,
    windows_schema,
)

if TYPE_CHECKING:
    from hf_gradguard.observe.layout import Layout

__all__ = ["RecordError", "RunRecord", "Segment"]

Floats = NDArray[np.float64]

_NUMBERS = ("loss", "learning_rate", "total_norm", "clip_coefficient", "seconds", "updated")
_HELD = ("windows", "weight", "accumulated_norm", "noise_scale", "updated")


@dataclass
class Segment:
    """One attempt, as it was written: also what a later attempt supersedes."""

    path: Path
    """Its directory."""
    run: dict[str, Any]
    """`run.json`: model, versions, arguments, configuration, start."""
    layout: Layout
    """The parameters of this attempt."""
    start_step: int
    """The step after which it started."""
    status: str
    """`finished`, `failed`, `stopped`, `interrupted`, `continued` (by the next segment, in the same training), or
    `running or killed`."""
    message: str
    """What was said at the end; empty if nothing was."""
    steps: NDArray[np.int64]
    """`[windows]`."""
    numbers: dict[str, Floats]
    """Loss, learning rate, total norm, clip coefficient, seconds and updated (0 or 1), each `[windows]`, by name."""
    group_norms: Floats
    """`[windows, groups]`, NaN where no parameter of the group had a gradient."""
    weight_steps: NDArray[np.int64]
    """`[k]`."""
    weight_norms: Floats
    """`[k, groups]`."""
    update_ratios: Floats
    """`[k, groups]`."""
    accumulation_steps: NDArray[np.int64]
    """`[m]`, empty where no policy decided when the optimizer steps."""
    accumulation: dict[str, Floats]
    """Windows held, weight, accumulated norm, noise scale and updated (0 or 1), each `[m]`, by name."""
    time_profiles: dict[int, TimeProfile]
    """How far back in time the gradient reached, by step, in the order of time; empty where it was not measured."""
    events: list[Event]
    """In the order in which they happened."""

    @classmethod
    def load(cls, path: Path) -> Segment:
        """Reads everything but the norms of the single parameters, of which a checksum is compared.

        Raises:
            RecordError: a file is damaged. An end that is missing is not damage.
        """
        run = files.read_json(path / files.RUN)
        if run.get("format") not in range(1, files.FORMAT + 1):
            raise RecordError(
                f"{path / files.RUN} has format {run.get('format')!r}, this version of hf-gradguard reads 1 to "
                f"{files.FORMAT}; read it with the version that wrote it, or a newer one"
            )
        layout = files.read_layout(path / files.LAYOUT)
        end = files.read_json(path / files.END) if (path / files.END).exists() else {"status": "running or killed"}
        steps, numbers, norms = _read_windows(path / files.WINDOWS, layout)
        return cls(
            path, run, layout, int(run.get("start_step", 0)), str(end.get("status")), str(end.get("message", "")),
            steps, numbers, norms, *_read_weights(path / files.WEIGHTS, layout),
            *_read_accumulation(path / files.ACCUMULATION), _read_time_profiles(path / files.TIME_PROFILES),
            _read_events(path / files.EVENTS),
        )  # fmt: skip

    def parameter_norms(self) -> Iterator[NDArray[np.float32]]:
        """Norms `[n, parameters]` of the windows, batch by batch, NaN: no gradient, or not recorded in that window.

        Only the windows that were there when the segment was loaded.
        """
        path, missing = self.path / files.WINDOWS, len(self.steps)
        for batch in read_stream(path, windows_schema()):
            if missing == 0:
                return
            rows, present = _ragged(path, batch["norms"], len(self.layout.parameters))
            norms = np.full((len(present), rows.shape[1]), np.nan, np.float32)
            norms[present] = np.where(rows == NO_GRADIENT, np.float32(np.nan), rows)
            missing -= len(present)
            yield norms
        if missing:
            raise RecordError.damaged(path, f"{missing} windows have gone since the record was loaded")


class RunRecord:
    """What is known of a run: its attempts laid end to end, without duplicates or holes.

    A segment that starts at step s supersedes every earlier row and event with a step beyond s, all of them if s is 0.
    Parameters and groups are those of the last segment; those of earlier ones are found by their names, NaN where they
    did not exist. The earlier attempts themselves are in `segments`.

    Example:
        >>> record = RunRecord.load("output")  # doctest: +SKIP
        >>> record.layer_norms[-1] / record.total_norms[-1]  # doctest: +SKIP
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        last = segments[-1]
        self.segments = list(segments)
        """All attempts, in the order in which they were made."""
        self.run = last.run
        """`run.json` of the last segment."""
        self.layout = last.layout
        """Layout of the last segment."""
        self.status = last.status
        """How the last segment ended: see `Segment.status`."""
        self.message = last.message
        """What was said at the end of the last segment."""
        self.parameters = [info.name for info in self.layout.parameters]
        """Names of the trainable parameters, in the order of the columns of `norms`."""
        self.layers = [self.layout.groups[index].name for index in self.layout.layers]
        """Names of the layers, in depth order."""

        limits = _limits(segments)
        self._kept = [segment.steps <= limit for segment, limit in zip(segments, limits, strict=True)]
        weights_kept = [segment.weight_steps <= limit for segment, limit in zip(segments, limits, strict=True)]
        self.steps = np.concatenate([segment.steps[kept] for segment, kept in zip(segments, self._kept, strict=True)])
        """Step of each window, int64 `[windows]`."""
        numbers = {
            name: np.concatenate([s.numbers[name][kept] for s, kept in zip(segments, self._kept, strict=True)])
            for name in _NUMBERS
        }
        self.losses = numbers["loss"]
        """`[windows]`, as all of these NaN where unknown."""
        self.learning_rates = numbers["learning_rate"]
        """`[windows]`."""
        self.total_norms = numbers["total_norm"]
        """L2 norm of the whole gradient before clipping, `[windows]`."""
        self.clip_coefficients = numbers["clip_coefficient"]
        """What the gradients were multiplied with, `[windows]`."""
        self.seconds = numbers["seconds"]
        """Time since the start of the window's own segment, `[windows]`."""
        self.updated = numbers["updated"].astype(np.bool_)
        """Whether the optimizer made an update, `[windows]`."""
        self.group_norms = self._by_group([s.group_norms for s in segments], self._kept)
        """L2 norm of each group's gradient, float64 `[windows, groups]`; NaN where it had none."""
        self.weight_steps = np.concatenate([s.weight_steps[k] for s, k in zip(segments, weights_kept, strict=True)])
        """Steps at which weights were measured, int64 `[k]`."""
        self.weight_norms = self._by_group([s.weight_norms for s in segments], weights_kept)
        """L2 norm of each group's weights, `[k, groups]`."""
        self.update_ratios = self._by_group([s.update_ratios for s in segments], weights_kept)
        """Norm of the update ÷ norm of the weights of each group, `[k, groups]`."""
        self._read_held(segments, limits)
        self.time_profiles = {
            step: profile
            for s, limit in zip(segments, limits, strict=True)
            for step, profile in s.time_profiles.items()
            if step <= limit
        }
        """How far back in time the gradient reached in some windows, by step, in the order of time."""
        self.events = [
            event for s, limit in zip(segments, limits, strict=True) for event in s.events if event.step <= limit
        ]
        """In the order in which they happened."""

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RunRecord:
        """Reads the record of a run, finished or not.

        Args:
            path: the run's output directory, or the `gradguard` directory in it.

        Raises:
            RecordError: there is no record, or it is damaged. That the last writer was killed is no damage.
        """
        directory = Path(path)
        for candidate in (directory, directory / "gradguard"):
            paths = [segment for segment in files.segment_paths(candidate) if (segment / files.RUN).exists()]
            if paths:
                return cls([Segment.load(segment) for segment in paths])
        raise RecordError(
            f"{directory} holds no record (no segment-0000/{files.RUN} in it or in {directory / 'gradguard'}); give "
            "the output_dir of a run that was trained with GradGuardCallback"
        )

    @cached_property
    def norms(self) -> NDArray[np.float32]:
        """L2 norm of each parameter's gradient, `[windows, parameters]`; NaN: no gradient, or not recorded there.

        Read when first asked for; takes 4 bytes a window a parameter.

        Raises:
            RecordError: the record was moved or damaged since it was loaded.
        """
        norms = np.full((len(self.steps), len(self.parameters)), np.nan, np.float32)
        first = 0
        for segment, kept in zip(self.segments, self._kept, strict=True):
            columns = _matching([info.name for info in segment.layout.parameters], self.parameters)
            position = 0
            for batch in segment.parameter_norms():
                rows = batch[kept[position : position + len(batch)]]
                _copy_columns(rows, norms[first : first + len(rows)], columns)
                position += len(batch)
                first += len(rows)
        return norms

    @property
    def layer_norms(self) -> Floats:
        """L2 norm of each layer's gradient, float64 `[windows, layers]`; NaN where it had none."""
        return self.group_norms[:, list(self.layout.layers)]

    def _read_held(self, segments: Sequence[Segment], limits: Sequence[float]) -> None:
        kept = [segment.accumulation_steps <= limit for segment, limit in zip(segments, limits, strict=True)]
        held = {
            name: np.concatenate([s.accumulation[name][k] for s, k in zip(segments, kept, strict=True)])
            for name in _HELD
        }
        self.accumulation_steps = np.concatenate([s.accumulation_steps[k] for s, k in zip(segments, kept, strict=True)])
        """Step of each window in which a policy decided whether the optimizer steps, int64 `[m]`; none without one."""
        self.held_windows = held["windows"].astype(np.int64)
        """Windows held after each of these, that window included, int64 `[m]`."""
        self.held_weights = held["weight"]
        """Target tokens held (micro-batches where there are no labels), `[m]`."""
        self.accumulated_norms = held["accumulated_norm"]
        """L2 norm of the held gradient as an update would use it, before clipping, `[m]`."""
        self.noise_scales = held["noise_scale"]
        """Estimate of the gradient noise scale in the unit of `held_weights`, `[m]`; NaN where unknown."""
        self.accumulation_updated = held["updated"].astype(np.bool_)
        """Whether the policy let the optimizer step with what was held, bool `[m]`; in a dry run, would have let."""

    def _by_group(self, tables: Sequence[Floats], kept: Sequence[NDArray[np.bool_]]) -> Floats:
        names = [group.name for group in self.layout.groups]
        result = np.full((sum(int(mask.sum()) for mask in kept), len(names)), np.nan)
        first = 0
        for segment, table, mask in zip(self.segments, tables, kept, strict=True):
            rows = table[mask]
            columns = _matching([group.name for group in segment.layout.groups], names)
            _copy_columns(rows, result[first : first + len(rows)], columns)
            first += len(rows)
        return result


def _limits(segments: Sequence[Segment]) -> list[float]:
    """The last step of each segment that no later segment supersedes."""
    limits: list[float] = [np.inf]
    for segment in reversed(segments[1:]):
        start = segment.start_step if segment.start_step > 0 else -np.inf
        limits.append(min(limits[-1], start))
    return limits[::-1]


def _matching(names: Sequence[str], wanted: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """Positions in `names` and in `wanted` of what both have; None where they are the same."""
    if list(names) == list(wanted):
        return None
    targets = {name: position for position, name in enumerate(wanted)}
    pairs = [(source, targets[name]) for source, name in enumerate(names) if name in targets]
    return [source for source, _ in pairs], [target for _, target in pairs]


def _copy_columns(
    source: NDArray[Any], target: NDArray[Any], columns: tuple[Sequence[int], Sequence[int]] | None
) -> None:
    if columns is None:
        target[:] = source
    else:
        target[:, columns[1]] = source[:, columns[0]]


def _read_windows(path: Path, layout: Layout) -> tuple[NDArray[np.int64], dict[str, Floats], Floats]:
    steps, numbers, groups = (
        [np.empty(0, np.int64)],
        [np.empty((0, len(_NUMBERS)))],
        [np.empty((0, len(layout.groups)))],
    )
    for batch in read_stream(path, windows_schema()):
        steps.append(batch["step"].to_numpy())
        numbers.append(np.stack([batch[name].to_numpy(zero_copy_only=False) for name in _NUMBERS], axis=1))
        groups.append(_read_group_norms(path, batch, layout))
    columns = np.concatenate(numbers).T
    return np.concatenate(steps), dict(zip(_NUMBERS, columns, strict=True)), np.concatenate(groups)


def _read_group_norms(path: Path, batch: Any, layout: Layout) -> Floats:
    norms, detailed = _ragged(path, batch["norms"], len(layout.parameters))
    rows, others = _ragged(path, batch["group_norms"], len(layout.groups))
    result = np.full((len(detailed), len(layout.groups)), NO_GRADIENT)
    result[others] = rows
    if detailed.any():
        result[detailed] = group_norms(layout, norms)
    result[result == NO_GRADIENT] = np.nan
    return result


def _ragged(path: Path, column: Any, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A list column as the rows `[k, width]` that are not empty, and which these are."""
    lengths = np.diff(column.offsets.to_numpy())
    present = lengths > 0
    if not (lengths[present] == width).all():
        raise RecordError.damaged(path, f"a row has {lengths.max()} norms, the layout has {width}")
    values: NDArray[np.float32] = column.values.to_numpy()
    return values.reshape(int(present.sum()), width), present


def _read_weights(path: Path, layout: Layout) -> tuple[NDArray[np.int64], Floats, Floats]:
    width = len(layout.groups)
    steps, norms, ratios = [np.empty(0, np.int64)], [np.empty((0, width))], [np.empty((0, width))]
    for batch in read_stream(path, weights_schema()):
        steps.append(batch["step"].to_numpy())
        for column, parts in (("weight_norms", norms), ("update_ratios", ratios)):
            rows, present = _ragged(path, batch[column], width)
            table = np.full((len(present), width), np.nan)
            table[present] = rows
            parts.append(table)
    return np.concatenate(steps), np.concatenate(norms), np.concatenate(ratios)


def _read_accumulation(path: Path) -> tuple[NDArray[np.int64], dict[str, Floats]]:
    steps, rows = [np.empty(0, np.int64)], [np.empty((0, len(_HELD)))]
    for batch in read_stream(path, accumulation_schema()):
        steps.append(batch["step"].to_numpy())
        rows.append(np.stack([batch[name].to_numpy(zero_copy_only=False) for name in _HELD], axis=1))
    columns = np.concatenate(rows).T
    return np.concatenate(steps), dict(zip(_HELD, columns, strict=True))


def _read_time_profiles(path: Path) -> dict[int, TimeProfile]:
    profiles = {}
    for batch in read_stream(path, time_profiles_schema()):
        column = {name: batch[name].to_numpy() for name in batch.schema.names}
        steps = np.unique(column["step"])
        if len(steps) != 1 or not np.array_equal(column["lag"], np.arange(len(column["lag"]))):
            raise RecordError.damaged(path, "a profile has not all lags from 0 on")
        quantiles = np.stack([column[name] for name in ("low", "middle", "high")], axis=1)
        profile = TimeProfile(column["mean"], quantiles, column["zero_share"], column["samples"].astype(np.int64))
        profiles[int(steps[0])] = profile
    return profiles


def _read_events(path: Path) -> list[Event]:
    # What follows the last line's end is a line that is being written, or whose writer was killed.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_read_event(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_event(path: Path, number: int, line: bytes) -> Event:
    try:
        return Event.from_dict(json.loads(line))
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError.damaged(path, f"line {number}: {error}") from error
