"""Each verdict is given where it is due, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike

from hf_gradguard.judge import SEVERITY, History, Stack, Thresholds, Verdict, judge

NAN = np.nan


def verdict_on(
    norms: ArrayLike, totals: Sequence[float] | None = None, stacks: Sequence[Stack] = (), **thresholds: float
) -> Verdict:
    """The verdict on a history of these updates `[updates, layers]`; one row stands for 20 equal updates."""
    rows = np.atleast_2d(np.asarray(norms, dtype=float))
    rows = np.repeat(rows, 20, axis=0) if len(rows) == 1 else rows
    history = History(rows.shape[1])
    for index, row in enumerate(rows):
        history.add(row, totals[index] if totals else float(np.sqrt(np.nansum(row**2))))
    return judge(history, stacks or [Stack.of_depth(rows.shape[1])], Thresholds(**thresholds))


def kinds(verdict: Verdict) -> list[str]:
    return [verdict.kind, *(other.kind for other in verdict.others)]


def test_a_fading_gradient_is_vanishing_and_names_the_layer_from_which_it_starves() -> None:
    verdict = verdict_on(0.5 ** np.arange(29.0, -1.0, -1.0))
    assert kinds(verdict) == ["vanishing"]
    # The top quarter is 7 layers, 1 … 2^-6; within a factor of 10 of its largest are 4, with 2^-1.5 in
    # their middle. 0.001 × 2^-1.5 lies between 2^-12 and 2^-11, so layer 18 is the first that is fed.
    assert verdict.layer == "layer 18"
    assert verdict.value == pytest.approx(0.5**28 / 2**-1.5)  # the lowest eighth is layers 0 … 2
    assert verdict.threshold == Thresholds().vanishing
    assert "layer 0 gets 2e-9 of the gradient norm of layer 29" in verdict.why
    assert "each layer passes on about 0.5" in verdict.why


def test_a_growing_gradient_is_exploding_towards_the_input() -> None:
    verdict = verdict_on(2.0 ** np.arange(29.0, -1.0, -1.0))
    assert kinds(verdict) == ["exploding"]
    assert verdict.layer == "layer 0"
    assert "factor of about 2" in verdict.why


@pytest.mark.parametrize(("factor", "kind"), [(0.9, "vanishing"), (1.1, "healthy")])
def test_the_line_between_vanishing_and_healthy_is_where_the_threshold_says(factor: float, kind: str) -> None:
    norms = np.ones(16)
    norms[:8] = factor * 1e-4
    assert verdict_on(norms, vanishing=1e-4).kind == kind


@pytest.mark.parametrize(("factor", "kind"), [(0.9, "healthy"), (1.1, "exploding")])
def test_the_line_between_exploding_and_healthy_is_where_the_threshold_says(factor: float, kind: str) -> None:
    norms = np.ones(16)
    norms[:8] = factor * 50.0
    assert verdict_on(norms, exploding=50.0).kind == kind


def test_one_odd_first_layer_of_a_deep_stack_is_healthy() -> None:
    norms = np.ones(100)
    norms[0] = 1e4
    assert verdict_on(norms).kind == "healthy"
    norms[0] = 1e-6
    assert verdict_on(norms).kind == "healthy"


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_depth_is_not_judged_with_fewer_than_four_layers(layers: int) -> None:
    assert verdict_on(1e-4 ** np.arange(layers, 0.0, -1.0)).kind == "healthy"
    assert verdict_on(1e-4 ** np.arange(4, 0.0, -1.0)).kind == "vanishing"


def test_layers_of_exact_zeros_are_dead_and_named() -> None:
    norms = np.ones(8)
    norms[[2, 5]] = 0.0
    verdict = verdict_on(norms)
    assert kinds(verdict) == ["dead"]
    assert "2 of 8 layers" in verdict.message
    assert "layer 2, layer 5" in verdict.why
    assert verdict.layer == "layer 5"


def test_all_layers_are_dead_where_only_the_rest_of_the_model_has_a_gradient() -> None:
    assert verdict_on(np.zeros(8), totals=[1.0] * 20).kind == "dead"
    assert verdict_on(np.zeros(8), totals=[0.0] * 20).kind == "unknown"


def test_frozen_and_unused_layers_are_absent_not_dead() -> None:
    norms = np.ones(12)
    norms[:6] = NAN
    assert verdict_on(norms).kind == "healthy"
    assert verdict_on(np.full(12, NAN), totals=[1.0] * 20).kind == "unknown"


def test_zeros_in_the_first_updates_only_are_no_alarm() -> None:
    rows = np.ones((20, 8))
    rows[:9, :] = 0.0  # nothing in the layers while zero-initialised branches or adapters wake up
    assert verdict_on(rows, totals=[1.0] * 20).kind == "healthy"


def test_a_layer_left_out_at_random_is_not_dead() -> None:
    rows = np.where(np.random.default_rng(0).random((20, 12)) < 0.5, 0.0, 1.0)
    assert verdict_on(rows).kind == "healthy"
    assert verdict_on(np.where(rows == 0, NAN, rows)).kind == "healthy"


def test_a_layer_seldom_used_is_not_dead_on_the_word_of_one_update() -> None:
    rows = np.ones((20, 6))
    rows[:, 3] = NAN
    rows[7, 3] = 0.0
    assert verdict_on(rows).kind == "healthy"


def test_growth_over_time_is_exploding_while_a_spike_is_not() -> None:
    steady = [1.0] * 60
    flat = np.ones((80, 4))
    grown = verdict_on(flat, totals=[*steady, *[6.0] * 20])
    assert kinds(grown) == ["exploding"]
    assert grown.value == pytest.approx(6.0)
    assert "median of 6, 6 times" in grown.why
    assert verdict_on(flat, totals=[*steady, *[1e6] * 9, *[1.0] * 11]).kind == "healthy"
    assert verdict_on(flat, totals=[*steady, *[4.9] * 20]).kind == "healthy"


def test_a_gradient_that_returns_to_where_it_began_is_no_explosion() -> None:
    totals = [*[2.0] * 20, *[1e-3] * 400, *[2.0] * 20]
    assert verdict_on(np.ones((440, 4)), totals=totals).kind == "healthy"


def test_each_stack_is_judged_by_itself() -> None:
    encoder, decoder = np.full(6, 1e-3), np.full(6, 10.0)
    names = [f"{part} layer {depth}" for part in ("encoder", "decoder") for depth in range(6)]
    stacks = [
        Stack("encoder", tuple(range(6)), tuple(names[:6])),
        Stack("decoder", tuple(range(6, 12)), tuple(names[6:])),
    ]
    assert verdict_on(np.concatenate([encoder, decoder])).kind == "vanishing"  # as one stack it would be
    assert verdict_on(np.concatenate([encoder, decoder]), stacks=stacks).kind == "healthy"
    faded = verdict_on(np.concatenate([encoder, 0.01 ** np.arange(6.0, 0.0, -1.0)]), stacks=stacks)
    assert kinds(faded) == ["vanishing"]
    assert faded.stack == "decoder"
    assert faded.layer is not None
    assert faded.layer.startswith("decoder layer")
    assert "of the decoder" in faded.message


def probed(zeros: Sequence[float] | None, stalled: Sequence[float] | None, times: int) -> Verdict:
    history = History(4)
    for _ in range(20):
        history.add(np.ones(4), 2.0)
    for _ in range(times):
        history.add_probe(zeros, stalled)
    return judge(history, [Stack.of_depth(4)])


def test_gradients_lost_in_16_bits_are_underflow() -> None:
    verdict = probed([0.9, 0.7, 0.1, NAN], None, times=2)
    assert kinds(verdict) == ["underflow"]
    assert (verdict.layer, verdict.value) == ("layer 0", 0.9)
    assert "In 2 of 4 layers over 50%" in verdict.why


def test_updates_lost_in_16_bits_are_underflow() -> None:
    verdict = probed([NAN] * 4, [0.1, NAN, 0.95, 0.3], times=2)
    assert kinds(verdict) == ["underflow"]
    assert (verdict.layer, verdict.value) == ("layer 2", 0.95)
    assert "In 1 of 4 layers" in verdict.why


def test_one_probe_alone_proves_no_underflow() -> None:
    assert probed([1.0] * 4, [1.0] * 4, times=1).kind == "healthy"
    history = History(4)
    for _ in range(20):
        history.add(np.ones(4), 2.0)
    history.add_probe([1.0] * 4)
    history.add_probe([0.0] * 4)
    assert judge(history, [Stack.of_depth(4)]).kind == "healthy"


def test_weights_in_32_bits_know_no_underflow() -> None:
    assert probed([NAN] * 4, [NAN] * 4, times=2).kind == "healthy"


def test_the_most_serious_finding_comes_first_and_brings_the_others() -> None:
    history = History(12)
    norms = 0.1 ** np.arange(12.0, 0.0, -1.0)
    norms[0] = 0.0
    for total in [*[1.0] * 30, *[100.0] * 20]:
        history.add(norms, total)
    for _ in range(2):
        history.add_probe([1.0] * 12)
    verdict = judge(history, [Stack.of_depth(12)])
    assert kinds(verdict) == ["exploding", "vanishing", "underflow", "dead"]
    assert kinds(verdict) == sorted(kinds(verdict), key=SEVERITY.index)


def test_too_few_updates_are_no_ground_for_a_verdict() -> None:
    history = History(8)
    for _ in range(9):
        history.add(0.1 ** np.arange(8.0, 0.0, -1.0), 1.0)
    assert judge(history, [Stack.of_depth(8)]).kind == "unknown"
    history.add(0.1 ** np.arange(8.0, 0.0, -1.0), 1.0)
    assert judge(history, [Stack.of_depth(8)]).kind == "vanishing"


def test_a_model_without_layers_is_judged_over_time_only() -> None:
    history = History(0)
    for total in [*[1.0] * 30, *[100.0] * 20]:
        history.add([], total)
    assert judge(history, []).kind == "exploding"


def test_every_alarm_says_why_and_what_next() -> None:
    dead = np.ones(8)
    dead[3] = 0.0
    alarms = [
        verdict_on(0.1 ** np.arange(8.0, 0.0, -1.0)),
        verdict_on(10.0 ** np.arange(8.0, 0.0, -1.0)),
        verdict_on(np.ones((40, 4)), totals=[*[1.0] * 20, *[100.0] * 20]),
        verdict_on(dead),
        probed([1.0] * 4, None, times=2),
        probed(None, [1.0] * 4, times=2),
    ]
    assert {alarm.kind for alarm in alarms} == {"vanishing", "exploding", "dead", "underflow"}
    for alarm in alarms:
        assert alarm.message.endswith(".")
        assert alarm.why.endswith(".")
        assert alarm.next.endswith(".")
        assert str(alarm).splitlines()[0] == f"Verdict: {alarm.kind}: {alarm.message}"
        assert Verdict.from_dict(json.loads(json.dumps(alarm.to_dict(), allow_nan=False))) == alarm


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window=0 must be a whole number from 1"),
        ({"every": 2.5}, "every=2.5 must be a whole number"),
        ({"min_updates": 30}, "min_updates=30 can't be more than window=20"),
        ({"min_layers": 1}, "min_layers=1 must be a whole number from 2"),
        ({"vanishing": 1.5}, "vanishing=1.5 must be a finite number between 0 and 1"),
        ({"vanishing": "low"}, "vanishing='low' must be"),
        ({"exploding": float("inf")}, "exploding=inf must be a finite number above 1"),
        ({"growth": 1}, "growth=1 must be"),
    ],
)
def test_an_impossible_threshold_is_refused_with_what_would_fit(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Thresholds(**options)


def test_thresholds_survive_json() -> None:
    thresholds = Thresholds(window=40, vanishing=1e-5)
    assert Thresholds(**json.loads(json.dumps(thresholds.to_dict()))) == thresholds


def test_a_stack_needs_a_name_for_each_column() -> None:
    with pytest.raises(ValueError, match="2 columns and 1 layer names"):
        Stack("", (0, 1), ("layer 0",))
