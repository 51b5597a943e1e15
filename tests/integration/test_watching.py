"""Watching changes nothing, and what it reads is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_gradguard import GradGuardCallback
from tests.counters import Counters
from tests.models import MODELS, make
from tests.training import BeforeClipping, assert_bit_equal, trainer, weights

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing_clipped": {"max_grad_norm": 1e6},
    "always_clipped": {"max_grad_norm": 1e-3},
    "no_clipping": {"max_grad_norm": 0.0},
    "accumulation": {"gradient_accumulation_steps": 4, "max_steps": 3, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "label_smoothing": {"label_smoothing_factor": 0.1},
}


class Readings(GradGuardCallback):
    """Keeps every reading."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.readings: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        assert self.guard is not None
        self.readings.append(self.guard.reading)


# T5 makes its decoder's inputs of the labels, which label smoothing takes away from it.
CASES = [(name, setting) for name in MODELS for setting in SETTINGS if (name, setting) != ("t5", "label_smoothing")]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_watched_weights_are_bit_equal_and_norms_exact(name: str, setting: str, tmp_path: Path) -> None:
    unwatched = trainer(make(name), tmp_path / "unwatched", **SETTINGS[setting])
    unwatched.train()

    callback = Readings(check_loss_scaling=False, weights_every=2)
    watched = trainer(make(name), tmp_path / "watched", callback, kind=BeforeClipping, **SETTINGS[setting])
    watched.train()

    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    assert len(callback.readings) == len(watched.seen) == watched.args.max_steps
    for reading, expected in zip(callback.readings, watched.seen, strict=True):
        found = reading.norms()
        assert found.keys() == expected.keys()
        for parameter, norm in expected.items():
            if norm is None:
                assert found[parameter] is None, parameter
            else:
                assert found[parameter] == pytest.approx(norm, rel=1e-6), parameter
        distinct = {id(parameter): name for name, parameter in watched.model.named_parameters()}
        total = np.sqrt(sum((expected[name] or 0.0) ** 2 for name in distinct.values()))
        assert reading.total_norm == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("setting", ["plain", "nothing_clipped", "always_clipped", "no_clipping", "accumulation"])
def test_the_trainers_log_stays_and_gains_our_numbers(setting: str, tmp_path: Path) -> None:
    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", **SETTINGS[setting])
    unwatched.train()
    watched = trainer(make("gpt2"), tmp_path / "watched", GradGuardCallback(), **SETTINGS[setting])
    watched.train()
    rows = zip(unwatched.state.log_history[:-1], watched.state.log_history[:-1], strict=True)
    for before, after in rows:
        assert after["loss"] == before["loss"]
        assert after["learning_rate"] == before["learning_rate"]
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)
        assert after["gradguard/grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)
        assert {"gradguard/depth_ratio", "gradguard/windows", "gradguard/updates"} < after.keys()
    last = watched.state.log_history[-2]
    assert last["gradguard/windows"] == last["gradguard/updates"] == watched.args.max_steps
    assert last["gradguard/clipped"] == {"always_clipped": watched.args.max_steps, "no_clipping": 0}.get(
        setting, last["gradguard/clipped"]
    )


def test_the_losses_read_are_the_trainers(tmp_path: Path) -> None:
    callback = Readings()
    watched = trainer(make("gpt2"), tmp_path, callback, **SETTINGS["accumulation"])
    watched.train()
    logged = [row["loss"] for row in watched.state.log_history if "loss" in row]
    assert [reading.loss for reading in callback.readings] == pytest.approx(logged, abs=1e-4)
    rates = [row["learning_rate"] for row in watched.state.log_history if "learning_rate" in row]
    assert [reading.learning_rate for reading in callback.readings] == pytest.approx(rates)


@pytest.mark.parametrize("limit", [1e6, 1e-3])
def test_watching_costs_no_wait_no_collective_and_one_pass(limit: float, tmp_path: Path) -> None:
    counts = {}
    for watched in (False, True):
        model = make("gpt2")
        callbacks = [GradGuardCallback(weights_every=0)] if watched else []
        run = trainer(model, tmp_path / str(watched), *callbacks, max_grad_norm=limit, logging_steps=100)
        with Counters(model.parameters()) as counters:
            run.train()
        counts[watched] = counters.counts
    size = 4 * sum(parameter.numel() for parameter in make("gpt2").parameters()) * 6
    assert counts[True]["waits"] <= counts[False]["waits"]
    assert counts[True]["collectives"] == counts[False]["collectives"] == 0
    # The Trainer reads everything once for the norm, and once more to multiply, whether that changes anything or not.
    assert counts[False]["gradient_reads"] == 2 * size
    assert counts[False]["gradient_writes"] == size
    if limit == 1e6:
        assert counts[True]["gradient_reads"] == size
        assert counts[True]["gradient_writes"] == 0
    else:
        assert counts[True]["gradient_reads"] == 3 * size
        assert counts[True]["gradient_writes"] == size


def test_a_model_that_the_trainer_compiles_is_read_and_not_changed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", **options)
    unwatched.train()
    callback = Readings()
    watched = trainer(make("gpt2"), tmp_path / "watched", callback, **options)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    assert all(callback.readings[-1].norms().values())


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_the_trainers_own_way_for_mixed_meshes_is_watched_too(limit: float, tmp_path: Path) -> None:
    class MixedMeshes(Trainer):
        def _has_mixed_mesh_grads(self, model: Any) -> bool:
            return True

    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", kind=MixedMeshes, max_grad_norm=limit)
    unwatched.train()
    callback = Readings()
    watched = trainer(make("gpt2"), tmp_path / "watched", callback, kind=MixedMeshes, max_grad_norm=limit)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    logged = [row["grad_norm"] for row in unwatched.state.log_history if "grad_norm" in row]
    assert [reading.total_norm for reading in callback.readings] == pytest.approx(logged, rel=1e-5)
    assert callback.readings[0].total_norm > 0


def test_a_compiled_model_is_read_under_its_own_names(tmp_path: Path) -> None:
    callback = Readings()
    compiled = torch.compile(make("gpt2"), backend="eager")
    trainer(compiled, tmp_path, callback, remove_unused_columns=False).train()  # type: ignore[arg-type]
    names = {name for name, _ in make("gpt2").named_parameters(remove_duplicate=False)}
    assert callback.readings[-1].norms().keys() == names
    assert all(callback.readings[-1].norms().values())
