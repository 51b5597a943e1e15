"""A record survives `kill -9` at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from hf_gradguard.events import Event
from hf_gradguard.record import files
from hf_gradguard.record.reader import RunRecord
from hf_gradguard.record.writer import RecordWriter
from tests.record.samples import assert_same_profile, held_at, layout_of, norms_at, profile_at, window_at

LAYOUT = layout_of({"layer 0": 200, "layer 1": 200})
COUNT = len(LAYOUT.parameters)
_MOMENTS = random.Random(0)
# Some before the first window is written, the others spread over a few hundred flushes.
SIZES = [0] * 3 + sorted(_MOMENTS.randrange(1, 400_000) for _ in range(47))


def write_for_ever(directory: Path, start_step: int) -> None:
    writer = RecordWriter(directory, LAYOUT, {}, start_step=start_step)
    step = start_step
    while True:
        step += 1
        if step % 3 == 1:
            writer.time_profile(step, profile_at(step))
        writer.accumulation(held_at(step))
        writer.window(window_at(step, COUNT))
        writer.event(Event("deferred", step))
        writer.event(Event("spike", step))
        if step % 5 == 0:
            writer.flush()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def write_and_kill(directory: Path, start_step: int, watched: Path, size: int) -> None:
    """Kills a writing process at the moment when `watched` has grown to `size`."""
    # Forked, because a new interpreter for each of 50 children would take minutes.
    child = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(directory, start_step))
    child.start()
    try:
        while size_of(watched) < size and child.is_alive():
            pass
        assert child.is_alive(), "the writer ended by itself"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def assert_gapless(record: RunRecord) -> None:
    steps = record.steps.tolist()
    assert steps == list(range(1, len(steps) + 1))
    expected = np.array([norms_at(step, COUNT) for step in steps], np.float32).reshape(len(steps), COUNT)
    np.testing.assert_array_equal(record.norms, expected)
    assert record.losses.tolist() == [1 / step for step in steps]
    for kind in ("deferred", "spike"):
        events = [event.step for event in record.events if event.kind == kind]
        assert events == list(range(1, len(events) + 1))
        assert len(steps) <= len(events) + 1
    rows = [held_at(step) for step in record.accumulation_steps.tolist()]
    assert record.held_weights.tolist() == [row.weight for row in rows]
    assert record.accumulation_updated.tolist() == [row.updated for row in rows]
    profiles = list(record.time_profiles)
    assert profiles == list(range(1, 3 * len(profiles), 3))
    assert len(profiles) >= len(steps) // 3  # each was there before its window
    for step, profile in record.time_profiles.items():
        assert_same_profile(profile, profile_at(step))


@pytest.mark.parametrize(("number", "size"), list(enumerate(SIZES)))
def test_a_killed_writer_leaves_a_gapless_record(tmp_path, number, size):
    # The first moments are those at which a segment has only begun to exist.
    watched = tmp_path / "segment-0000" / (files.RUN if number < 3 else files.WINDOWS)
    write_and_kill(tmp_path, 0, watched, size)
    record = RunRecord.load(tmp_path)
    assert record.status == "running or killed"
    assert_gapless(record)
    # Windows are written first, so that at most the rows of one flush are missing.
    held = record.accumulation_steps.tolist()
    assert held == list(range(1, len(held) + 1))
    assert len(record.steps) - 5 <= len(held) <= len(record.steps)
    if number >= 3:
        assert watched.stat().st_size >= size


def test_a_run_killed_and_resumed_five_times_reads_as_one_line(tmp_path):
    start = 0
    for number in range(5):
        write_and_kill(tmp_path, start, files.segment_path(tmp_path, number) / files.WINDOWS, 30_000 * (number + 1))
        record = RunRecord.load(tmp_path)
        assert_gapless(record)
        start = int(record.steps[-1]) - 3  # as from a checkpoint that is a little older than the last window
    assert len(record.segments) == 5
