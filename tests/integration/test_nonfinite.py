"""A NaN or an infinity in one element of one gradient costs one window, and is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gradguard import GradGuardCallback
from tests.models import make
from tests.training import Poison, Snapshots, trainer

NAMES = [name for name, _ in make("bert").named_parameters()]
WINDOWS = 4


def run(tmp_path: Path, parameter: str, window: int, value: float, *callbacks: Any, **options: Any) -> Any:
    model = make("bert")
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    micro_batches = options.get("gradient_accumulation_steps", 1)
    poison = Poison(model.get_parameter(parameter), window, value, micro_batches)
    guarded = trainer(model, tmp_path, poison, *callbacks, **{"max_steps": WINDOWS, **options})
    guarded.train()
    return guarded


def is_finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# Every parameter in the middle window; every value and window for some.
CASES = [(name, 2, math.nan) for name in NAMES]
CASES += [(name, window, value) for name in NAMES[::9] for window in (1, WINDOWS) for value in (math.nan, math.inf)]
CASES += [(name, 2, -math.inf) for name in NAMES[::5]]


@pytest.mark.parametrize(("parameter", "window", "value"), CASES)
def test_the_bad_window_touches_no_weight_and_its_parameter_is_named(
    parameter: str, window: int, value: float, tmp_path: Path
) -> None:
    callback, snapshots = GradGuardCallback(), Snapshots()
    run(tmp_path, parameter, window, value, callback, snapshots)
    states = snapshots.weights
    assert all(is_finite(state) for state in states)
    untouched = [is_same(states[index], states[index + 1]) for index in range(WINDOWS)]
    assert untouched == [index == window - 1 for index in range(WINDOWS)]
    guard = callback.guard
    assert guard is not None
    events = [event for event in guard.events if event.kind == "nonfinite"]
    assert [(event.parameter, event.step, event.action, event.micro_batch) for event in events] == [
        (parameter, window, "skip", 0)
    ]
    assert guard.skipped == 1
    assert guard.updates == WINDOWS - 1


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"optim": "sgd"},
        {"optim": "adafactor"},
    ],
    ids=["accumulation", "bf16", "no_clipping", "sgd", "adafactor"],
)
def test_a_skip_is_a_true_skip_in_every_setting(options: dict[str, Any], tmp_path: Path) -> None:
    callback, snapshots = GradGuardCallback(), Snapshots()
    run(tmp_path, NAMES[5], 2, math.nan, callback, snapshots, **options)
    untouched = [is_same(snapshots.weights[index], snapshots.weights[index + 1]) for index in range(WINDOWS)]
    assert untouched == [False, True, False, False]
    assert is_finite(snapshots.weights[-1])
    assert callback.guard is not None
    assert callback.guard.reading is not None
    assert [event.parameter for event in callback.guard.events if event.kind == "nonfinite"] == [NAMES[5]]


def test_a_skipped_window_leaves_the_optimizers_state_as_it_was(tmp_path: Path) -> None:
    guarded = run(tmp_path, NAMES[5], WINDOWS, math.nan, GradGuardCallback())
    steps = {int(state["step"]) for state in guarded.optimizer.state_dict()["state"].values()}
    assert steps == {WINDOWS - 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_trainer_alone_loses_every_weight_to_a_nan(value: float, tmp_path: Path) -> None:
    snapshots = Snapshots()
    run(tmp_path, NAMES[5], 2, value, snapshots)
    lost = [name for name, tensor in snapshots.weights[-1].items() if not torch.isfinite(tensor).all()]
    assert len(lost) > (0 if math.isinf(value) else len(NAMES) - 1)


def test_observe_says_so_and_leaves_the_trainer_to_it(tmp_path: Path) -> None:
    alone, watched = Snapshots(), Snapshots()
    run(tmp_path / "alone", NAMES[5], 2, math.nan, alone)
    callback = GradGuardCallback(nonfinite="observe")
    run(tmp_path / "watched", NAMES[5], 2, math.nan, callback, watched)
    for before, after in zip(alone.weights, watched.weights, strict=True):
        assert all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)
    assert callback.guard is not None
    assert callback.guard.events[0].action == "observe"


def test_stop_ends_training_with_the_weights_before(tmp_path: Path) -> None:
    callback, snapshots = GradGuardCallback(nonfinite="stop"), Snapshots()
    guarded = run(tmp_path, NAMES[5], 2, math.nan, callback, snapshots)
    assert guarded.state.global_step == 2
    assert is_same(snapshots.weights[1], snapshots.weights[2])
    assert callback.guard is not None
    assert [event.kind for event in callback.guard.events][:2] == ["nonfinite", "stopped"]


def test_weights_that_are_nan_end_training_after_the_budget(tmp_path: Path) -> None:
    model = make("bert")
    with torch.no_grad():
        model.get_parameter(NAMES[0])[5] = math.nan
    callback = GradGuardCallback(nonfinite="skip:max_consecutive=3")
    guarded = trainer(model, tmp_path, callback, max_steps=10)
    guarded.train()
    assert guarded.state.global_step == 3
    assert callback.guard is not None
    assert callback.guard.events[-1].kind == "stopped"
