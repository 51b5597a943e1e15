"""What was written is what is read."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from hf_gradguard.events import Event
from hf_gradguard.observe.layout import Layout
from hf_gradguard.record import files
from hf_gradguard.record import writer as writer_module
from hf_gradguard.record.reader import RecordError, RunRecord
from hf_gradguard.record.writer import RecordWriter
from tests.record.samples import SMALL, assert_same_profile, held_at, layout_of, norms_at, profile_at, window_at

COUNT = len(SMALL.parameters)


def write(directory, steps, layout=SMALL, status="finished", start_step=0, **options):
    writer = RecordWriter(directory, layout, {"model": "tiny"}, start_step=start_step, **options)
    for step in steps:
        writer.window(window_at(step, len(layout.parameters)))
    writer.close(status)
    return writer


def expected_group_norms(norms, layout=SMALL):
    """By a loop over the parameters, with math.fsum."""
    sums = [[] for _ in layout.groups]
    for info, norm in zip(layout.parameters, norms, strict=True):
        if norm != -1:
            sums[info.group].append(float(np.float32(norm)) ** 2)
    return [math.sqrt(math.fsum(squares)) if squares else math.nan for squares in sums]


def test_every_value_of_every_window_comes_back(tmp_path):
    write(tmp_path, range(1, 201), flush_seconds=math.inf)
    record = RunRecord.load(tmp_path)
    windows = [window_at(step) for step in range(1, 201)]
    assert record.steps.tolist() == list(range(1, 201))
    assert record.steps.dtype == np.int64
    for read, name in [
        (record.losses, "loss"),
        (record.learning_rates, "learning_rate"),
        (record.total_norms, "total_norm"),
        (record.clip_coefficients, "clip_coefficient"),
        (record.seconds, "seconds"),
        (record.updated, "updated"),
    ]:
        assert read.tolist() == [getattr(window, name) for window in windows]
    assert record.norms.dtype == np.float32
    np.testing.assert_array_equal(record.norms, np.stack([window.norms for window in windows]).astype(np.float32))
    assert record.parameters == [info.name for info in SMALL.parameters]
    assert (record.run["model"], record.status, record.layout) == ("tiny", "finished", SMALL)


def test_unknown_numbers_come_back_as_nan(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.window(window_at(1, loss=None, learning_rate=None, clip_coefficient=None))
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    for values in (record.losses, record.learning_rates, record.clip_coefficients):
        assert np.isnan(values).all()


def test_group_norms_are_the_l2_norms_of_their_parameters(tmp_path):
    write(tmp_path, range(1, 100))
    record = RunRecord.load(tmp_path)
    expected = np.array([expected_group_norms(norms_at(step, COUNT)) for step in range(1, 100)])
    np.testing.assert_allclose(record.group_norms, expected, rtol=1e-14)
    assert record.layers == ["layer 0", "layer 1"]
    np.testing.assert_array_equal(record.layer_norms, record.group_norms[:, 1:3])


@pytest.mark.parametrize("record_every", [1, 2])
def test_missing_and_nonfinite_gradients_keep_their_meaning(tmp_path, record_every):
    norms = norms_at(1, COUNT)
    groups = SMALL.group_of
    norms[groups == 0] = -1.0
    norms[np.flatnonzero(groups == 1)[0]] = -1.0
    norms[np.flatnonzero(groups == 2)[0]] = np.nan
    norms[groups == 3] = np.inf
    writer = RecordWriter(tmp_path, SMALL, {}, record_every=record_every)
    writer.window(window_at(1, norms=norms, total_norm=math.nan))
    writer.window(window_at(2, norms=norms, total_norm=math.inf))
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    expected = np.array([expected_group_norms(norms)] * 2)
    np.testing.assert_allclose(record.group_norms, expected, rtol=1e-7)
    assert np.isnan(expected[0, [0, 2]]).all()
    assert np.isinf(expected[0, 3])
    np.testing.assert_array_equal(record.norms[0], np.where(norms == -1, np.nan, norms).astype(np.float32))
    np.testing.assert_array_equal(record.total_norms, [math.nan, math.inf])


def test_between_recorded_windows_the_groups_are_still_there(tmp_path):
    write(tmp_path, range(1, 31), record_every=7)
    record = RunRecord.load(tmp_path)
    detailed = np.arange(30) % 7 == 0
    assert np.isnan(record.norms[~detailed]).all()
    expected = np.stack([norms_at(step, COUNT) for step in range(1, 31)])
    np.testing.assert_array_equal(record.norms[detailed], expected[detailed].astype(np.float32))
    np.testing.assert_allclose(record.group_norms, [expected_group_norms(norms) for norms in expected], rtol=1e-7)


def test_auto_doubles_the_interval_each_time_128_mb_are_full(tmp_path, monkeypatch):
    assert writer_module.BYTES_A_LEVEL == 128_000_000
    monkeypatch.setattr(writer_module, "BYTES_A_LEVEL", 32 * 4 * COUNT)  # 32 windows instead
    write(tmp_path, range(1, 105))
    detailed = ~np.isnan(RunRecord.load(tmp_path).norms).any(axis=1)
    expected = [index < 32 or (index < 96 and index % 2 == 0) or index % 4 == 0 for index in range(104)]
    assert detailed.tolist() == expected


def test_updates_of_parameters_combine_to_the_update_of_their_group(tmp_path):
    rng = np.random.default_rng(0)
    before = [rng.normal(size=(4, 5)) for _ in SMALL.parameters]
    moves = [rng.normal(size=(4, 5)) * 1e-3 for _ in SMALL.parameters]
    norms = np.array([np.linalg.norm(weight) for weight in before])
    ratios = np.array([np.linalg.norm(move) for move in moves]) / norms
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.window(window_at(1))
    writer.weights(1, norms, ratios)
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert record.weight_steps.tolist() == [1]
    for group in range(len(SMALL.groups)):
        members = np.flatnonzero(SMALL.group_of == group)
        weight = np.linalg.norm(np.concatenate([before[index].ravel() for index in members]))
        move = np.linalg.norm(np.concatenate([moves[index].ravel() for index in members]))
        assert record.weight_norms[0, group] == pytest.approx(weight, rel=1e-6)
        assert record.update_ratios[0, group] == pytest.approx(move / weight, rel=1e-6)


def test_a_weight_that_was_zero_does_not_hide_the_update_of_its_group(tmp_path):
    norms, ratios = np.full(COUNT, 2.0), np.full(COUNT, 0.5)
    first = np.flatnonzero(SMALL.group_of == 1)[0]
    norms[first], ratios[first] = 0.0, np.inf
    norms[SMALL.group_of == 3], ratios[SMALL.group_of == 3] = 0.0, np.nan
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.weights(1, norms, ratios)
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    np.testing.assert_allclose(record.update_ratios, [[0.5, 0.5, 0.5, np.nan]], rtol=1e-7)
    assert record.weight_norms[0, 3] == 0


def test_events_are_there_at_once_and_come_back_whole(tmp_path):
    events = [
        Event("nonfinite", 3, parameter="layer.0.p0.weight", layer="layer 0", value=math.inf, action="skip"),
        Event("vanishing", 4, value=1e-9, threshold=1e-6, message="Zeile\nüber zwei"),
    ]
    writer = RecordWriter(tmp_path, SMALL, {})
    for event in events:
        writer.event(event)
    assert RunRecord.load(tmp_path).events == events
    writer.close("failed", "ValueError: x")
    record = RunRecord.load(tmp_path)
    assert (record.events, record.status, record.message) == (events, "failed", "ValueError: x")


def test_events_of_routine_kinds_come_with_the_windows_and_keep_their_place(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    events = [Event(kind, step) for step, kind in enumerate(["deferred", "clipped", "nonfinite", "deferred"], start=1)]
    for event in events[:2]:
        writer.event(event)
    assert RunRecord.load(tmp_path).events == []
    for event in events[2:]:
        writer.event(event)
    assert RunRecord.load(tmp_path).events == events[:3]
    writer.flush()
    assert RunRecord.load(tmp_path).events == events


def test_an_event_is_written_without_what_is_unknown(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.event(Event("dead", 7, value=0.5))
    assert writer.path.joinpath(files.EVENTS).read_text() == '{"kind":"dead","step":7,"value":0.5}\n'
    assert RunRecord.load(tmp_path).events == [Event("dead", 7, value=0.5)]


def test_an_event_takes_at_most_250_bytes_of_memory(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    for step in range(1, 20_001):
        writer.event(Event("deferred", step, value=step / 3, threshold=2.0, action="hold"))
    writer.close("finished")
    tracemalloc.start()
    try:
        record = RunRecord.load(tmp_path)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(record.events) == 20_000
    assert held < 250 * 20_000


# What is held


def test_what_is_held_after_every_window_comes_back(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    for step in range(1, 101):
        writer.accumulation(held_at(step))
        writer.window(window_at(step))
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    rows = [held_at(step) for step in range(1, 101)]
    for read, name, dtype in [
        (record.accumulation_steps, "step", np.int64),
        (record.held_windows, "windows", np.int64),
        (record.held_weights, "weight", np.float64),
        (record.accumulated_norms, "accumulated_norm", np.float64),
        (record.noise_scales, "noise_scale", np.float64),
        (record.accumulation_updated, "updated", np.bool_),
    ]:
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, [getattr(row, name) for row in rows])
    assert np.isnan(record.noise_scales[:3]).all()


def test_what_is_held_may_be_told_before_or_after_its_window(tmp_path):
    for name in ("before", "after"):
        writer = RecordWriter(tmp_path / name, SMALL, {}, flush_seconds=0)
        for step in (1, 2, 3):
            calls = [
                lambda w=writer, s=step: w.accumulation(held_at(s)),
                lambda w=writer, s=step: w.window(window_at(s)),
            ]
            for call in calls if name == "before" else reversed(calls):
                call()
        writer.close("finished")
        record = RunRecord.load(tmp_path / name)
        assert record.steps.tolist() == record.accumulation_steps.tolist() == [1, 2, 3]


def test_what_was_held_in_superseded_windows_is_gone(tmp_path):
    for start, steps in ((0, range(1, 8)), (5, range(6, 10))):
        writer = RecordWriter(tmp_path, SMALL, {}, start_step=start)
        for step in steps:
            writer.accumulation(held_at(step, weight=float(start)))
            writer.window(window_at(step))
        writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert record.accumulation_steps.tolist() == list(range(1, 10))
    assert record.held_weights.tolist() == [0.0] * 5 + [5.0] * 4
    assert record.segments[0].accumulation_steps.tolist() == list(range(1, 8))
    RecordWriter(tmp_path, SMALL, {})
    assert RunRecord.load(tmp_path).accumulation_steps.tolist() == []


def test_a_policy_that_is_taken_up_on_resuming_is_known_from_there_on(tmp_path):
    write(tmp_path, range(1, 6))
    writer = RecordWriter(tmp_path, SMALL, {}, start_step=5)
    writer.accumulation(held_at(6))
    writer.window(window_at(6))
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert record.accumulation_steps.tolist() == [6]


def test_time_profiles_are_there_at_once_and_come_back_exactly(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    for step, lags in ((1, 20), (101, 5), (201, 300)):
        writer.time_profile(step, profile_at(step, lags))
    profiles = RunRecord.load(tmp_path).time_profiles
    assert list(profiles) == [1, 101, 201]
    assert profiles[201].lags.tolist() == list(range(300))
    for step, lags in ((1, 20), (101, 5), (201, 300)):
        assert_same_profile(profiles[step], profile_at(step, lags))
        assert profiles[step].norms is None


def test_time_profiles_of_superseded_windows_are_gone(tmp_path):
    for start, steps in ((0, (1, 4, 7)), (5, (6, 9))):
        writer = RecordWriter(tmp_path, SMALL, {}, start_step=start)
        for step in steps:
            writer.time_profile(step, profile_at(step + start))
        writer.close("finished")
    profiles = RunRecord.load(tmp_path).time_profiles
    assert list(profiles) == [1, 4, 6, 9]
    assert_same_profile(profiles[6], profile_at(11))
    assert list(RunRecord.load(tmp_path).segments[0].time_profiles) == [1, 4, 7]


def test_a_record_without_time_profiles_has_none(tmp_path):
    writer = write(tmp_path, [1, 2])
    assert not (writer.path / files.TIME_PROFILES).exists()
    assert RunRecord.load(tmp_path).time_profiles == {}


def test_a_run_that_is_not_closed_is_readable_up_to_its_last_flush(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    for step in range(1, 11):
        writer.window(window_at(step))
    assert RunRecord.load(tmp_path).steps.tolist() == []
    writer.flush()
    writer.window(window_at(11))
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == list(range(1, 11))
    writer.flush()
    assert record.norms.shape == (10, COUNT), "what was loaded stays what it was"
    assert record.status == "running or killed"


def test_windows_are_written_when_the_time_has_come_or_the_buffer_is_full(tmp_path):
    at_once = RecordWriter(tmp_path / "a", SMALL, {}, flush_seconds=0)
    at_once.window(window_at(1))
    assert len(RunRecord.load(tmp_path / "a").steps) == 1
    late = RecordWriter(tmp_path / "b", SMALL, {}, flush_seconds=math.inf)
    for step in range(1, 64):
        late.window(window_at(step))
    assert len(RunRecord.load(tmp_path / "b").steps) == 0
    late.window(window_at(64))
    assert len(RunRecord.load(tmp_path / "b").steps) == 64


@pytest.mark.parametrize(
    "layout", [Layout((), ()), layout_of({"layer 0": 1}), layout_of({"head": 1}, {"head": "head"})]
)
def test_any_layout_is_readable_with_and_without_windows(tmp_path, layout):
    writer = RecordWriter(tmp_path, layout, {})
    count = len(layout.parameters)
    assert RunRecord.load(tmp_path).norms.shape == (0, count)
    writer.window(window_at(1, count))
    writer.weights(1, np.ones(count), np.ones(count))
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert record.norms.shape == (1, count)
    assert record.group_norms.shape == record.weight_norms.shape == (1, len(layout.groups))
    assert record.layer_norms.shape == (1, len(layout.layers))


def test_a_layout_with_numbers_anywhere_in_its_names_comes_back(tmp_path):
    layout = layout_of({"layer 0": 2, "layer 007": 1, "12": 1, "b-٣": 1, "": 1})
    files.write_layout(tmp_path / "x", layout)
    assert files.read_layout(tmp_path / "x") == layout


def test_the_reader_finds_the_record_from_the_output_directory(tmp_path):
    write(tmp_path / "gradguard", [1, 2])
    assert (
        RunRecord.load(tmp_path).steps.tolist() == RunRecord.load(str(tmp_path / "gradguard")).steps.tolist() == [1, 2]
    )


def test_writing_a_record_needs_neither_torch_nor_transformers():
    code = (
        "import sys, hf_gradguard.record.writer, hf_gradguard.record.reader;"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Segments


def test_a_resumed_run_reads_as_one_line(tmp_path):
    write(tmp_path, range(1, 11), status="interrupted")
    write(tmp_path, range(7, 15), start_step=6)
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == list(range(1, 15))
    np.testing.assert_array_equal(
        record.norms, np.stack([norms_at(step, COUNT) for step in range(1, 15)]).astype(np.float32)
    )
    assert [segment.steps.tolist() for segment in record.segments] == [list(range(1, 11)), list(range(7, 15))]
    assert [segment.status for segment in record.segments] == ["interrupted", "finished"]


def test_a_segment_may_learn_late_after_which_step_it_starts(tmp_path):
    write(tmp_path, range(1, 11))
    writer = RecordWriter(tmp_path, SMALL, {"model": "tiny"})
    assert RunRecord.load(tmp_path).steps.tolist() == []
    writer.start_at(6)
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == list(range(1, 7))
    assert record.run["model"] == "tiny"
    writer.window(window_at(7))
    writer.start_at(3)
    writer.close("finished")
    assert RunRecord.load(tmp_path).steps.tolist() == list(range(1, 8)), "a segment with windows stays where it is"


def test_a_later_resume_supersedes_all_segments_before_it(tmp_path):
    write(tmp_path, range(1, 11))
    write(tmp_path, range(9, 15), start_step=8)
    write(tmp_path, range(6, 8), start_step=5)
    assert RunRecord.load(tmp_path).steps.tolist() == list(range(1, 8))


def test_a_fresh_start_supersedes_everything_but_the_attempts_stay_readable(tmp_path):
    first = write(tmp_path, range(1, 11))
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    RecordWriter(tmp_path, SMALL, {})
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == []
    assert record.segments[0].steps.tolist() == list(range(1, 11))
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before


def test_events_and_weights_of_superseded_steps_are_gone(tmp_path):
    for start, steps in ((0, (0, 3, 7)), (5, (6, 9))):
        writer = RecordWriter(tmp_path, SMALL, {}, start_step=start)
        for step in steps:
            writer.event(Event("dead", step, rank=start))
            writer.weights(step, np.ones(COUNT), np.ones(COUNT))
        writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert [(event.step, event.rank) for event in record.events] == [(0, 0), (3, 0), (6, 5), (9, 5)]
    assert record.weight_steps.tolist() == [0, 3, 6, 9]


def test_segments_with_other_parameters_are_laid_together_by_name(tmp_path):
    old = layout_of({"embeddings": 2, "layer 0": 3}, {"embeddings": "embeddings"})
    new = layout_of({"layer 0": 2, "layer 1": 2})
    write(tmp_path, [1, 2], layout=old)
    write(tmp_path, [3], layout=new, start_step=2)
    record = RunRecord.load(tmp_path)
    assert record.layout == new
    by_name = dict(zip([info.name for info in old.parameters], norms_at(1, 5), strict=True))
    expected = [np.float32(by_name.get(name, np.nan)) for name in record.parameters]
    np.testing.assert_array_equal(record.norms[0], expected)
    assert np.isnan(expected).sum() == 2
    np.testing.assert_allclose(
        record.layer_norms[0], [expected_group_norms(norms_at(1, 5), old)[1], np.nan], rtol=1e-14
    )
    np.testing.assert_array_equal(record.norms[2], norms_at(3, 4).astype(np.float32))


def test_a_segment_that_was_not_begun_is_passed_over(tmp_path):
    write(tmp_path, [1])
    (tmp_path / "segment-0001").mkdir()
    assert len(RunRecord.load(tmp_path).segments) == 1
    assert write(tmp_path, [2], start_step=1).path.name == "segment-0002"
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2]


# Damage


def test_a_path_without_a_record_is_one_clear_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "gradguard"):
        with pytest.raises(RecordError, match=r"holds no record .* give the output_dir"):
            RunRecord.load(path)


def test_the_last_batch_cut_at_any_byte_is_passed_over(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {}, flush_seconds=math.inf)
    stream = writer.path / files.WINDOWS
    for step in (1, 2, 3):
        writer.window(window_at(step))
        writer.window(window_at(step + 100))
        writer.flush()
        if step == 2:
            whole = stream.stat().st_size
    data = stream.read_bytes()
    for end in range(whole, len(data)):
        stream.write_bytes(data[:end])
        assert RunRecord.load(tmp_path).steps.tolist() == [1, 101, 2, 102]
    for end in range(0, whole, 7):
        stream.write_bytes(data[:end])
        assert RunRecord.load(tmp_path).steps.tolist() in ([], [1, 101])


def test_a_last_event_cut_at_any_byte_is_passed_over(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    writer.event(Event("dead", 1))
    writer.event(Event("dead", 2))
    path = writer.path / files.EVENTS
    data = path.read_bytes()
    for end in range(data.index(b"\n") + 1, len(data)):
        path.write_bytes(data[:end])
        assert [event.step for event in RunRecord.load(tmp_path).events] == [1]


def test_one_wrong_bit_anywhere_is_an_error_or_a_cut_end_but_never_a_wrong_value(tmp_path):
    writer = write(tmp_path, range(1, 41), flush_seconds=math.inf)
    stream = writer.path / files.WINDOWS
    data = stream.read_bytes()
    expected = np.stack([norms_at(step, COUNT) for step in range(1, 41)]).astype(np.float32)
    errors = 0
    for position in range(0, len(data), 3):
        garbled = bytearray(data)
        garbled[position] ^= 1 << position % 8
        stream.write_bytes(garbled)
        try:
            record = RunRecord.load(tmp_path)
        except RecordError as error:
            assert str(stream) in str(error)  # noqa: PT017
            errors += 1
        else:
            np.testing.assert_array_equal(record.norms, expected[: len(record.steps)])
    assert errors > len(data) / 3 * 0.8


@pytest.mark.parametrize(
    "name",
    [
        files.WINDOWS,
        files.WEIGHTS,
        files.ACCUMULATION,
        files.TIME_PROFILES,
        files.EVENTS,
        files.RUN,
        files.LAYOUT,
        files.END,
    ],
)
@pytest.mark.parametrize("content", [b"not what it should be\n" * 9, b"[1]\n", b"\x80\xff\xff\xff\x00\n"])
def test_a_wrong_file_is_one_error_that_names_it_and_the_remedy(tmp_path, name, content):
    writer = write(tmp_path, [1, 2])
    (writer.path / name).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        RunRecord.load(tmp_path)
    assert f"{writer.path / name} is damaged" in str(caught.value)
    assert f"move the directory {writer.path} away" in str(caught.value)


def test_a_stream_of_other_columns_is_an_error(tmp_path):
    writer = write(tmp_path, [1, 2])
    writer.path.joinpath(files.WEIGHTS).write_bytes(writer.path.joinpath(files.WINDOWS).read_bytes())
    with pytest.raises(RecordError, match="its columns are"):
        RunRecord.load(tmp_path)


def test_a_profile_that_is_not_whole_is_an_error(tmp_path):
    writer = RecordWriter(tmp_path, SMALL, {})
    columns = writer_module._time_profile_columns(1, profile_at(1))
    writer._stream(files.TIME_PROFILES).append({name: column[1:] for name, column in columns.items()})
    with pytest.raises(RecordError, match="a profile has not all lags"):
        RunRecord.load(tmp_path)


def test_a_stream_of_another_layout_is_an_error(tmp_path):
    writer = write(tmp_path, [1, 2])
    files.write_layout(writer.path / files.LAYOUT, layout_of({"layer 0": 3}))
    with pytest.raises(RecordError, match="a row has 9 norms, the layout has 3"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize("number", [99, 0, None, "2", [2]])
def test_a_record_of_an_unknown_format_says_so(tmp_path, number):
    writer = write(tmp_path, [1])
    files.write_json(writer.path / files.RUN, {"format": number})
    with pytest.raises(RecordError, match=r"format .*reads 1 to 2; read it with the version that wrote it"):
        RunRecord.load(tmp_path)


def test_a_record_of_the_first_format_is_read_and_gone_on_with(tmp_path):
    first = write(tmp_path, [1, 2])
    facts = files.read_json(first.path / files.RUN)
    assert facts["format"] == 2
    files.write_json(first.path / files.RUN, facts | {"format": 1})
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2]
    write(tmp_path, [3], start_step=2)
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2, 3]
