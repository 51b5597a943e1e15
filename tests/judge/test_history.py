"""A history holds the last finite updates and what the gradient usually is, and survives JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_gradguard.judge import History


def filled(updates: int, window: int = 6, layers: int = 3) -> History:
    rng = np.random.default_rng(0)
    history = History(layers, window=window)
    for row in np.exp(rng.normal(size=(updates, layers))):
        history.add(row, float(row.sum()))
    return history


@pytest.mark.parametrize("updates", [0, 1, 5, 6, 7, 20])
def test_the_ring_holds_the_last_updates(updates: int) -> None:
    rows = np.exp(np.random.default_rng(0).normal(size=(updates, 3)))
    history = filled(updates)
    last = rows[-6:] if updates else rows
    np.testing.assert_array_equal(np.sort(history.norms, axis=0), np.sort(last, axis=0))
    np.testing.assert_allclose(np.sort(history.total_norms), np.sort(last.sum(axis=1)), rtol=1e-15)
    assert history.count == updates


def test_updates_that_are_not_finite_leave_no_trace() -> None:
    history = filled(9)
    before = json.dumps(history.state_dict())
    for total in (np.nan, np.inf):
        assert not history.add([1.0, 1.0, 1.0], total)
    assert not history.add([1.0, np.inf, 1.0], 1.0)
    assert json.dumps(history.state_dict()) == before


def test_a_layer_without_gradient_is_remembered_as_absent() -> None:
    history = History(2)
    assert history.add([1.0, np.nan], 1.0)
    np.testing.assert_array_equal(history.norms, [[1.0, np.nan]])


def test_the_callers_array_may_change_afterwards() -> None:
    history, row = History(2), np.ones(2)
    history.add(row, 1.0)
    history.add_probe(row, row)
    row[:] = 7.0
    np.testing.assert_array_equal(history.norms, [[1.0, 1.0]])
    np.testing.assert_array_equal(history.probes[0].zero_gradients, [1.0, 1.0])


def test_usual_norm_is_the_opening_level_until_the_average_is_above_it() -> None:
    history = History(1, window=2)
    for total in (1.0, 3.0, 2.0, 9.0, 0.5):
        assert history.usual_norm is None
        history.add([1.0], total)
    assert history.usual_norm == pytest.approx(2.0)
    for _ in range(3000):
        history.add([1.0], 1e-3)
    assert history.usual_norm == pytest.approx(2.0)
    for _ in range(20_000):
        history.add([1.0], 50.0)
    assert history.usual_norm == pytest.approx(50.0, rel=1e-3)


def test_usual_norm_hardly_moves_in_the_hundred_updates_of_an_explosion() -> None:
    history = History(1, window=20)
    for _ in range(200):
        history.add([1.0], 1.0)
    for _ in range(100):
        history.add([1.0], 1e4)
    assert history.usual_norm is not None
    assert history.usual_norm < 2.5


@pytest.mark.parametrize("updates", [0, 4, 6, 15])
def test_a_history_restored_from_json_goes_on_as_if_never_interrupted(updates: int) -> None:
    first = filled(updates)
    first.add([np.nan, 0.0, 1e-300], 2.0)
    first.add_probe([0.1, np.nan, 1.0])
    second = History(3, window=6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for history in (first, second):
        for total in range(1, 12):
            history.add([1.0, 2.0, total / 3], total / 7)
        history.add_probe(None, [0.3, 0.2, np.nan])
    assert first.state_dict() == second.state_dict()
    np.testing.assert_array_equal(first.norms, second.norms)
    assert first.usual_norm == second.usual_norm


def test_what_does_not_fit_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"layer_norms has shape \(2,\).* 3 layers"):
        filled(1).add([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match=r"stalled_weights has shape"):
        filled(1).add_probe(None, [1.0])
    with pytest.raises(ValueError, match=r"6 updates × 3 layers.*9 × 3"):
        History(3, window=9).load_state_dict(filled(7).state_dict())
    with pytest.raises(ValueError, match=r"6 updates × 3 layers.*6 × 4"):
        History(4, window=6).load_state_dict(filled(7).state_dict())
