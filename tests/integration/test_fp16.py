"""Under an fp16 scaler norms are those of the unscaled gradients, and its search for a scale is no alarm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_gradguard import GradGuardCallback
from tests.integration.test_watching import Readings
from tests.models import make
from tests.training import Snapshots, assert_bit_equal, trainer, weights


class Scaled(Trainer):
    """Trains in fp16 with a loss scaler on the CPU, where Accelerate would leave the scaler out."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=1000)
        self.accelerator.native_amp = True
        self.seen: list[dict[str, float]] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        scale = self.accelerator.scaler.get_scale()
        self.seen.append({name: p.grad.double().norm().item() / scale for name, p in self.model.named_parameters()})
        return loss


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_norms_are_unscaled_and_weights_bit_equal(limit: float, tmp_path: Path) -> None:
    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", kind=Scaled, fp16=True, max_grad_norm=limit)
    unwatched.train()
    callback = Readings()
    watched = trainer(make("gpt2"), tmp_path / "watched", callback, kind=Scaled, fp16=True, max_grad_norm=limit)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    for reading, expected in zip(callback.readings, watched.seen, strict=True):
        found = {name: reading.norms()[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_scalers_search_is_no_alarm_and_its_skips_are_not_counted_as_updates(tmp_path: Path) -> None:
    callback, snapshots = GradGuardCallback(), Snapshots()
    # On a CPU fp16 gradients pass through float32, so that the overflow has to be made.
    run = trainer(make("gpt2"), tmp_path, callback, snapshots, kind=OverflowsTwice, fp16=True)
    run.train()
    guard = callback.guard
    assert guard is not None
    assert guard.events == []
    assert (guard.windows, guard.updates, guard.skipped) == (6, 4, 0)
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(snapshots.weights, snapshots.weights[1:], strict=False)
    ]
    assert same == [True, True, False, False, False, False]


class OverflowsTwice(Scaled):
    """Its first two windows overflow, as those of a scaler that starts too high do."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step < 2:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return loss


def test_a_scaler_that_finds_no_scale_ends_training_with_the_reason(tmp_path: Path) -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    callback = GradGuardCallback(nonfinite="skip:max_consecutive=3")
    run = trainer(model, tmp_path, callback, kind=Scaled, fp16=True)
    run.train()
    assert run.state.global_step == 3
    assert callback.guard is not None
    assert [event.kind for event in callback.guard.events] == ["nonfinite", "stopped"]
