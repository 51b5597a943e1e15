"""The record's size, and what happens when the disk takes no more."""

from __future__ import annotations

import logging
import math
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from hf_gradguard.events import Event
from hf_gradguard.observe.layout import Group, Layout, ParameterInfo
from hf_gradguard.record.reader import RunRecord
from hf_gradguard.record.writer import RecordWriter
from tests.record.samples import SMALL, held_at, layout_of, profile_at, window_at

BERT_PARTS = [
    f"{module}.{kind}"
    for module in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
]


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def no_file_beyond(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("flush_seconds", [0, math.inf])
@pytest.mark.parametrize("parameters", [1, 148, 1610])
def test_a_record_keeps_within_its_size_at_any_rate_of_flushing(tmp_path, parameters, flush_seconds):
    layout = layout_of({"layer 0": parameters})
    rng = np.random.default_rng(0)
    writer = RecordWriter(tmp_path, layout, {"arguments": "x" * 6000}, flush_seconds=flush_seconds)
    count = 1500
    for step in range(1, count + 1):
        loss, rate, total, coefficient = rng.random(4)
        norms = rng.random(parameters)
        writer.window(
            window_at(
                step, 1, norms=norms, loss=loss, learning_rate=rate, total_norm=total, clip_coefficient=coefficient
            )
        )
        if step % 100 == 0:
            writer.weights(step, norms, norms)
            writer.event(Event("spike", step, value=total, message="x" * 100))
    writer.close("finished")
    assert len(RunRecord.load(tmp_path).steps) == count
    assert size_of(tmp_path) <= count * (4 * parameters + 64) + 64_000


def write_held(directory, count, *, flush_seconds, accumulation=True, routine=0):
    """A record of windows that nothing can compress, with so many events of routine kinds in each."""
    rng = np.random.default_rng(0)
    writer = RecordWriter(directory, layout_of({"layer 0": 1}), {}, flush_seconds=flush_seconds)
    for step in range(1, count + 1):
        loss, rate, total, coefficient, weight, norm, noise, seconds = rng.random(8)
        if accumulation:
            windows, updated = int(rng.integers(1, 1 << 31)), bool(rng.random() < 0.5)
            writer.accumulation(
                held_at(step, windows=windows, weight=weight, accumulated_norm=norm, noise_scale=noise, updated=updated)
            )
        writer.window(
            window_at(
                step, 1, norms=rng.random(1), loss=loss, learning_rate=rate, total_norm=total,
                clip_coefficient=coefficient, seconds=seconds,
            )
        )  # fmt: skip
        for _ in range(routine):
            writer.event(Event("deferred", step, value=norm, threshold=2.0, action="hold"))
    return writer


@pytest.mark.parametrize("flush_seconds", [0, math.inf])
def test_what_is_held_adds_at_most_48_bytes_a_window(tmp_path, flush_seconds):
    count = 3000
    write_held(tmp_path, count, flush_seconds=flush_seconds).close("finished")
    assert len(RunRecord.load(tmp_path).accumulation_steps) == count
    assert size_of(tmp_path) <= count * (4 + 64 + 48) + 64_000


def test_full_buffers_of_what_is_held_take_at_most_48_bytes_a_window(tmp_path):
    count, sizes = 50 * 64, {}
    for accumulation in (False, True):
        directory = tmp_path / str(accumulation)
        write_held(directory, count, flush_seconds=math.inf, accumulation=accumulation).close("finished")
        sizes[accumulation] = size_of(directory)
    assert 36 * count < sizes[True] - sizes[False] <= 48 * count


def test_without_a_policy_there_is_no_table_of_what_is_held(tmp_path):
    writer = write_held(tmp_path, 10, flush_seconds=0, accumulation=False)
    writer.close("finished")
    assert not (writer.path / "accumulation.arrow").exists()
    record = RunRecord.load(tmp_path)
    for values in (record.accumulation_steps, record.held_windows, record.held_weights, record.accumulated_norms,
                   record.noise_scales, record.accumulation_updated):  # fmt: skip
        assert values.shape == (0,)


def test_a_time_profile_takes_at_most_56_bytes_a_lag_and_a_frame(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    for step in range(10):
        writer.time_profile(step, profile_at(step, 500))
    writer.close("finished")
    assert (writer.path / "time_profiles.arrow").stat().st_size <= 10 * (56 * 500 + 1_100)


def test_time_profiles_delay_no_flush(tmp_path):
    written = []
    for profiles in (0, 20):
        writer = RecordWriter(tmp_path / str(profiles), SMALL, {}, flush_seconds=0)
        for step in range(1, 301):
            for _ in range(profiles):
                writer.time_profile(step, profile_at(step))
            writer.window(window_at(step))
        written.append(len(RunRecord.load(tmp_path / str(profiles)).steps))
    assert written[0] == written[1] > 250


def test_events_of_routine_kinds_delay_no_flush(tmp_path):
    written = []
    for routine in (0, 20):
        write_held(tmp_path / str(routine), 300, flush_seconds=0, routine=routine)
        written.append(len(RunRecord.load(tmp_path / str(routine)).steps))
    assert size_of(tmp_path / "20") > 300 * 20 * 80
    assert written[0] == written[1] > 250


def test_an_event_of_a_routine_kind_takes_at_most_120_bytes(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.event(Event("deferred", 999_999, value=1 / 3, threshold=2 / 3, action="would hold"))
    writer.close("finished")
    assert (writer.path / "events.jsonl").stat().st_size <= 120


def test_the_names_of_16_000_parameters_take_a_quarter_of_the_fixed_size(tmp_path):
    groups = tuple(Group(f"layer {index}", "layer", depth=index) for index in range(1000))
    parameters = tuple(
        ParameterInfo(f"bert.encoder.layer.{index}.{part}", index, "attention", (64, 64), "float32")
        for index in range(1000)
        for part in BERT_PARTS
    )
    RecordWriter(tmp_path, Layout(groups, parameters), {})
    assert size_of(tmp_path) <= 16_000
    assert RunRecord.load(tmp_path).layout.parameters == parameters


def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path, caplog):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    with caplog.at_level(logging.WARNING), no_file_beyond(20_000):
        for step in range(1, 2001):
            writer.accumulation(held_at(step))
            writer.window(window_at(step))
            writer.event(Event("deferred", step))
            writer.event(Event("spike", step))
            writer.weights(step, np.ones(9), np.ones(9))
        writer.flush()
        writer.close("finished")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for part in (str(writer.path), "File too large", "make room on the disk"):
        assert part in message
    record = RunRecord.load(tmp_path)
    steps = record.steps.tolist()
    assert 64 <= len(steps) < 2000
    assert steps == list(range(1, len(steps) + 1))
    assert "not recorded to the end" in record.message
    assert "File too large" in record.message


def test_what_stands_after_a_failed_write_is_never_taken_for_its_end(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    for step in range(1, 65):
        writer.window(window_at(step))
    full = (writer.path / "windows.arrow").stat().st_size
    with no_file_beyond(full + 500):
        for step in range(65, 129):
            writer.window(window_at(step))
    writer.close("finished")
    assert (writer.path / "windows.arrow").stat().st_size == full + 500
    assert len(RunRecord.load(tmp_path).steps) == 64


def test_a_directory_that_cannot_be_written_is_one_error_before_anything_is(tmp_path):
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "gradguard"):
        with pytest.raises(OSError, match=r"can't be written to .*file.*; give an output directory"):
            RecordWriter(directory, SMALL, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_at_the_start_leaves_no_segment_to_read(tmp_path):
    with no_file_beyond(50), pytest.raises(OSError, match="can't be written"):
        RecordWriter(tmp_path, SMALL, {})
    with pytest.raises(ValueError, match="holds no record"):
        RunRecord.load(tmp_path)


def test_a_disk_that_is_full_when_a_time_profile_comes_is_one_warning(tmp_path, caplog):
    writer = RecordWriter(tmp_path, SMALL, {})
    with no_file_beyond(3_000):
        for step in range(9):
            writer.time_profile(step, profile_at(step))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    profiles = RunRecord.load(tmp_path).time_profiles
    assert 0 < len(profiles) < 9
    assert list(profiles) == list(range(len(profiles)))


def test_a_closed_writer_writes_no_more(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.window(window_at(1))
    writer.close("finished")
    before = size_of(tmp_path)
    writer.window(window_at(2))
    writer.accumulation(held_at(2))
    writer.time_profile(2, profile_at(2))
    for kind in ("spike", "deferred"):
        writer.event(Event(kind, 2))
    writer.weights(2, np.ones(9), np.ones(9))
    writer.close("failed")
    assert size_of(tmp_path) == before
    assert RunRecord.load(tmp_path).status == "finished"
