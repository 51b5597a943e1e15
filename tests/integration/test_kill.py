"""A training killed with SIGKILL at any moment leaves a readable record of all but its last flush."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from hf_gradguard import GradGuardCallback, RunRecord
from tests.models import make
from tests.training import trainer

_MOMENTS = random.Random(1)
SIZES = [0, 1, *(_MOMENTS.randrange(1, 60_000) for _ in range(48))]


def train_for_ever(output_dir: Path) -> None:
    trainer(make("gpt2"), output_dir, GradGuardCallback(flush_seconds=0), max_steps=10**6).train()


def kill_when_grown(output_dir: Path, size: int) -> None:
    watched = output_dir / "gradguard" / "segment-0000" / ("windows.arrow" if size else "run.json")
    child = multiprocessing.get_context("fork").Process(target=train_for_ever, args=(output_dir,))
    child.start()
    try:
        while not watched.exists() or watched.stat().st_size < size:
            assert child.is_alive(), "the training ended by itself"
    finally:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_killed_training_leaves_a_readable_record(size: int, tmp_path: Path) -> None:
    kill_when_grown(tmp_path, size)
    record = RunRecord.load(tmp_path)
    assert record.status == "running or killed"
    assert record.run["model"]["class"] == "GPT2LMHeadModel"
    assert record.steps.tolist() == list(range(1, len(record.steps) + 1))
    assert bool(size > 1000) <= bool(len(record.steps))
    whole = np.sqrt(np.square(record.norms.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(whole, record.total_norms, rtol=1e-6)
