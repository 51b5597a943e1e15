"""What was drawn once can be drawn again, from every generator."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hf_gradguard.observe.random_state import RandomState

DRAWS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "python_gauss": lambda: random.gauss(0.0, 1.0),  # keeps every second value for the next call
    "numpy": lambda: float(np.random.rand()),
    "numpy_normal": lambda: float(np.random.randn()),
    "torch": lambda: float(torch.rand(())),
    "torch_normal": lambda: float(torch.randn(())),
    "dropout": lambda: float(torch.nn.functional.dropout(torch.ones(64), 0.5).sum()),
}


@pytest.mark.parametrize("draws", [1, 3, 700])
@pytest.mark.parametrize("kind", DRAWS)
def test_what_was_drawn_is_drawn_again(kind: str, draws: int) -> None:
    draw = DRAWS[kind]
    draw()
    state = RandomState.capture()
    first = [draw() for _ in range(draws)]
    for _ in range(2):
        state.restore()
        assert [draw() for _ in range(draws)] == first


def test_capturing_draws_nothing() -> None:
    state = RandomState.capture()
    first = [draw() for draw in DRAWS.values()]
    state.restore()
    RandomState.capture()
    assert [draw() for draw in DRAWS.values()] == first


def test_cuda_that_nobody_uses_is_left_asleep() -> None:
    was_in_use = torch.cuda.is_initialized()
    RandomState.capture().restore()
    assert torch.cuda.is_initialized() == was_in_use


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_was_drawn_on_a_gpu_is_drawn_again() -> None:
    torch.rand(3, device="cuda")
    state = RandomState.capture()
    first = torch.rand(1000, device="cuda")
    state.restore()
    assert torch.equal(first, torch.rand(1000, device="cuda"))
