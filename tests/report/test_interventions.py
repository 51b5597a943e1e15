from pathlib import Path

import numpy as np
import pytest

from hf_gradguard.events import Event
from hf_gradguard.record.writer import AccumulationRow, RecordWriter
from hf_gradguard.report.interventions import Interventions, interventions
from hf_gradguard.report.runs import Run
from tests.record.samples import SMALL, window_at
from tests.report import synthetic

FIXED = {"nonfinite": "skip:max_consecutive=20", "clip": "trainer", "accumulate": "fixed:windows=4", "dry_run": False}


def found(directory: Path) -> Interventions:
    result = interventions(Run.load(directory))
    assert result is not None
    return result


def by_fours(directory: Path, windows: int, events: list[Event], guard: dict[str, object]) -> Path:
    """A run that updates in every fourth window."""
    updated = np.arange(windows) % 4 == 3
    held = [Event("deferred", int(step), action="hold") for step in np.flatnonzero(~updated) + 1]
    rows = [
        AccumulationRow(i + 1, i % 4 + 1, 100.0 * (i % 4 + 1), 1.0, np.nan, bool(updated[i])) for i in range(windows)
    ]
    return synthetic.write(
        directory, synthetic.healthy(windows), updated=updated, events=held + events, rows=rows, run={"guard": guard}
    )


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_sort_is_counted(tmp_path: Path, dry_run: bool):
    done = synthetic.acting(tmp_path, 400, dry_run=dry_run)
    sums = found(tmp_path)

    assert sums.dry_run == dry_run
    assert (sums.windows, sums.updates) == (400, len(done.sizes))
    assert done.deferred + done.skipped + len(done.sizes) == 400
    assert [(sort.name, sort.windows) for sort in sums.sorts] == [
        ("deferred", done.deferred),
        ("skipped", done.skipped),
        ("clipped", done.clipped),
    ]
    assert sums.sizes == f"{min(done.sizes)} to {max(done.sizes)}"


def test_each_sort_names_its_policy_and_its_share(tmp_path: Path):
    done = synthetic.acting(tmp_path, 400, accumulate="ramp:end=8", clip="agc:clipping=0.01")
    deferred, skipped, clipped = found(tmp_path).sorts

    assert (deferred.policy, deferred.share) == ("accumulate=ramp:end=8", f"{done.deferred / 400:.0%} of windows")
    assert (skipped.policy, skipped.share) == ("nonfinite=skip:max_consecutive=20", "0.5% of windows")
    assert (clipped.policy, clipped.share) == (
        "clip=agc:clipping=0.01",
        f"{done.clipped / len(done.sizes):.0%} of updates",
    )
    assert clipped.detail == f"smallest factor {min(done.factors):.2g}"


def test_in_a_dry_run_the_factor_of_the_trainers_own_clip_is_not_taken_for_the_rules(tmp_path: Path):
    guard = {"clip": "zclip", "dry_run": True}
    events = [Event("clipped", 3, value=2.0, threshold=1.0, action="would clip")]
    coefficients = np.full(10, 0.25)
    directory = synthetic.write(
        tmp_path, synthetic.healthy(10), events=events, coefficients=coefficients, run={"guard": guard}
    )
    skipped, clipped = found(directory).sorts

    assert (skipped.windows, clipped.windows, clipped.detail) == (0, 1, "")
    assert found(directory).line() == "of 10 windows none would have been skipped, 1 clipped; 10 updates made"


def test_updates_of_equal_size_are_said_to_be(tmp_path: Path):
    sums = found(by_fours(tmp_path, 16, [], FIXED))

    assert sums.made() == "Of 16 windows, 4 updates were made, of 4 windows each."
    assert sums.line() == "16 windows, 4 updates: 12 deferred"


def test_windows_that_were_given_up_are_counted_by_their_number(tmp_path: Path):
    events = [Event("discarded", 18, value=2.0, action="discard", message="2 windows held back were discarded")]
    sums = found(by_fours(tmp_path, 18, events, FIXED))

    assert sums.line() == "18 windows, 4 updates: 14 deferred, 2 discarded"


def test_a_window_that_ended_training_is_skipped_once(tmp_path: Path):
    events = [Event("nonfinite", 20, action="stop"), Event("stopped", 20, action="stop")]
    sums = found(by_fours(tmp_path, 20, events, FIXED | {"nonfinite": "stop"}))

    assert [(sort.name, sort.windows, sort.policy) for sort in sums.sorts][1] == ("skipped", 1, "nonfinite=stop")


def test_a_rule_that_never_clipped_says_so(tmp_path: Path):
    directory = synthetic.write(tmp_path, synthetic.healthy(5), run={"guard": {"clip": "global:max_norm=100.0"}})

    assert found(directory).line() == "5 windows, 5 updates: none clipped"


@pytest.mark.parametrize(
    "guard",
    [
        {},
        {"thresholds": {}},
        {"nonfinite": "skip:max_consecutive=20", "clip": "trainer", "accumulate": "none", "dry_run": False},
        {"clip": "none", "accumulate": "none"},
    ],
)
def test_without_a_policy_there_is_nothing_to_sum_up(tmp_path: Path, guard: dict[str, object]):
    events = [Event("nonfinite", 3, action="skip")]
    directory = synthetic.write(
        tmp_path, synthetic.healthy(9), events=events, coefficients=np.full(9, 0.5), run={"guard": guard}
    )

    assert interventions(Run.load(directory)) is None


def test_what_an_earlier_attempt_deferred_is_summed_up_though_the_policy_is_off_by_now(tmp_path: Path):
    by_fours(tmp_path, 8, [], FIXED)
    writer = RecordWriter(tmp_path / "gradguard", SMALL, {"guard": FIXED | {"accumulate": "none"}}, start_step=8)
    writer.window(window_at(9, updated=True))
    writer.close("finished")
    sums = found(tmp_path)

    assert sums.line() == "9 windows, 3 updates: 6 deferred"
    assert sums.sorts[0].policy == ""


def test_events_of_windows_that_are_not_recorded_yet_are_not_counted(tmp_path: Path):
    writer = RecordWriter(tmp_path / "gradguard", SMALL, {"guard": FIXED}, flush_seconds=1e9)
    writer.window(window_at(1, updated=False))
    writer.event(Event("deferred", 1, action="hold"))
    writer.flush()
    writer.window(window_at(2, updated=False))
    writer.event(Event("nonfinite", 2, action="skip"))

    assert found(tmp_path).line() == "1 window, 0 updates: 1 deferred"
