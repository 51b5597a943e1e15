"""On a GPU: the same weights to the last bit, and no wait for the device that the Trainer did not have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gradguard import GradGuardCallback
from tests.models import make
from tests.training import BeforeClipping, assert_bit_equal, trainer, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "clipped": {"max_grad_norm": 1e-3},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "fused": {"optim": "adamw_torch_fused", "fp16": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_watched_weights_are_bit_equal_and_norms_exact(setting: str, tmp_path: Path) -> None:
    options = {"use_cpu": False, **SETTINGS[setting]}
    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", **options)
    unwatched.train()
    callback = GradGuardCallback(weights_every=0)
    watched = trainer(make("gpt2"), tmp_path / "watched", callback, kind=BeforeClipping, **options)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    if "fp16" not in options:
        assert callback.guard is not None
        assert callback.guard.reading is not None
        assert callback.guard.reading.norms() == pytest.approx(watched.seen[-1], rel=1e-6)


def waits(tmp_path: Path, *callbacks: Any, **options: Any) -> int:
    run = trainer(make("gpt2"), tmp_path, *callbacks, use_cpu=False, logging_steps=1000, **options)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_watching_adds_no_wait_for_the_device(tmp_path: Path) -> None:
    unwatched = [waits(tmp_path / f"unwatched-{steps}", max_steps=steps) for steps in (5, 15)]
    watched = [
        waits(tmp_path / f"watched-{steps}", GradGuardCallback(weights_every=0), max_steps=steps) for steps in (5, 15)
    ]
    assert watched[1] - watched[0] <= unwatched[1] - unwatched[0]  # waits a step; starting up may have its own
