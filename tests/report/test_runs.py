from pathlib import Path

import numpy as np
import pytest

from hf_gradguard.events import Event
from hf_gradguard.judge import Judge, Stack
from hf_gradguard.record.writer import AccumulationRow
from hf_gradguard.report.runs import Run, run_names
from tests.report import synthetic


def test_the_verdict_is_the_one_that_the_live_judge_reached(tmp_path: Path):
    norms = synthetic.vanishing(120, 40)
    live = Judge([Stack.of_depth(40)])
    events = []
    for index, row in enumerate(norms):
        # The record holds norms in single precision, the judge sees them before they are rounded.
        change = live.update(row, float(np.sqrt(np.sum(row**2) + 2)))
        if change is not None:
            events.append(Event(change.kind, index + 1, message=change.message))
    assert events[-1].kind == "vanishing"

    run = Run.load(synthetic.write(tmp_path, norms, events=events))

    assert run.verdict.kind == live.verdict.kind
    assert (run.verdict.message, run.verdict.next) == (live.verdict.message, live.verdict.next)
    assert run.verdict.layer == live.verdict.layer
    assert run.since == events[-1].step


def test_a_verdict_that_norms_do_not_show_keeps_the_guards_own_words(tmp_path: Path):
    said = Event("underflow", 20, layer="layer 3", value=0.7, message="gradients are lost to rounding.")
    run = Run.load(synthetic.write(tmp_path, synthetic.healthy(40), events=[said]))

    assert (run.verdict.kind, run.verdict.message, run.verdict.layer) == ("underflow", said.message, "layer 3")
    assert "float32" in run.verdict.next


def test_updates_that_were_skipped_do_not_change_the_verdict(tmp_path: Path):
    norms = synthetic.healthy(40)
    norms[30:] = np.nan

    assert Run.load(synthetic.write(tmp_path, norms)).verdict.kind == "healthy"


def test_windows_that_were_deferred_count_for_the_verdict_as_for_the_live_judge(tmp_path: Path):
    norms = synthetic.vanishing(120, 40)
    updated = np.arange(120) % 30 == 29
    held = [Event("deferred", int(step), action="hold") for step in np.flatnonzero(~updated) + 1]
    live = Judge([Stack.of_depth(40)])
    for row in norms:
        live.update(row, float(np.sqrt(np.sum(row**2) + 2)))

    run = Run.load(synthetic.write(tmp_path, norms, updated=updated, events=held))

    assert run.verdict.kind == live.verdict.kind == "vanishing"
    assert run.verdict.message == live.verdict.message
    np.testing.assert_array_equal(run.deferred, ~updated)
    assert run.unit == "window"


def test_a_dry_run_defers_nothing(tmp_path: Path):
    run = Run.load(synthetic.acting(tmp_path, 60, dry_run=True).directory)

    assert run.dry_run
    assert not run.deferred.any()
    assert run.unit == "update"


def test_what_is_held_is_laid_beside_its_windows(tmp_path: Path):
    rows = [AccumulationRow(step, 1, 10.0 * step, 1.0, np.nan, True) for step in (2, 3, 5, 9)]
    run = Run.load(synthetic.write(tmp_path, synthetic.healthy(6), rows=rows))

    nan = np.nan
    np.testing.assert_array_equal(run.held(run.record.held_weights), [nan, 20, 30, nan, 50, nan])


def test_thresholds_are_those_of_the_run(tmp_path: Path):
    norms = np.full((40, 8), 1.0) * np.logspace(-1, 0, 8)
    guard = {"guard": {"thresholds": {"vanishing": 0.5, "starving": 0.2}}}

    assert Run.load(synthetic.write(tmp_path / "default", norms)).verdict.kind == "healthy"
    assert Run.load(synthetic.write(tmp_path / "strict", norms, run=guard)).verdict.kind == "vanishing"


def test_the_ratio_is_the_first_layers_norm_over_the_last_ones_of_those_trained(tmp_path: Path):
    norms = synthetic.healthy(20, 6)
    norms[:, 0] = -1.0
    run = Run.load(synthetic.write(tmp_path, norms))

    np.testing.assert_allclose(run.ratio(run.stacks[0]), norms[:, 1] / norms[:, 5], rtol=1e-6)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a/gradguard"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["same", "same"], ["same (1)", "same (2)"]),
    ],
)
def test_names_are_the_shortest_that_tell_runs_apart(paths: list[str], names: list[str]):
    assert run_names(paths) == names
