"""The noise-scale estimates are without bias where the answer is known, and right on a language model."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hf_gradguard.act.accumulation import Accumulator, Fixed
from hf_gradguard.observe.noise_scale import GradientNoise, NoiseScale, gradient_noise
from hf_gradguard.observe.norms import Measurement
from tests.models import language_data, make

EQUAL = [[16, 16, 16, 16]]
UNEQUAL = [[3, 40, 17, 1]]
VARYING = [[3, 40], [16, 16, 16], [1, 2, 3, 4, 5], [64, 2]]


class Regression:
    """y = x·θ* + ε with x ~ N(0, 1) and ε ~ N(0, σ²), squared error halved, seen from a point at d = θ − θ*. The
    gradient of an example is x (x·d − ε); its mean is d, and the trace of its covariance is
    E |x|² (x·d)² + E |x|² ε² − |d|² = (D + 2) |d|² + D σ² − |d|²."""

    def __init__(self, dimensions: int = 6, sigma: float = 1.5, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.sigma = sigma
        self.gradient = self.random.normal(size=dimensions) / 2
        self.square = float(self.gradient @ self.gradient)
        self.trace = (dimensions + 1) * self.square + dimensions * sigma**2

    def window(self, size: int) -> NDArray[np.float64]:
        inputs = self.random.normal(size=(size, len(self.gradient)))
        noise = self.random.normal(scale=self.sigma, size=size)
        return inputs.T @ (inputs @ self.gradient - noise) / size


def close_to(found: list[float], expected: float) -> None:
    """The mean of the draws is within four of its standard errors of what is expected, and these are small."""
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 4 * error
    assert error < 0.05 * expected


@pytest.mark.parametrize("plan", [EQUAL, UNEQUAL, VARYING])
@pytest.mark.parametrize("unweighted", [False, True])
def test_estimates_are_unbiased_for_windows_of_any_sizes(plan: list[list[int]], unweighted: bool) -> None:
    problem = Regression()
    traces, squares, estimated_errors, errors = [], [], [], []
    for sizes in itertools.islice(itertools.cycle(plan), 12_000):
        windows = [problem.window(size) for size in sizes]
        shares = np.ones(len(sizes)) if unweighted else np.array(sizes)
        mean = np.average(windows, axis=0, weights=shares)
        noise = gradient_noise(sizes, [g @ g for g in windows], mean @ mean, shares if unweighted else None)
        traces.append(noise.trace)
        squares.append(noise.squared_gradient)
        estimated_errors.append(noise.squared_error)
        errors.append(float(np.sum((mean - problem.gradient) ** 2)))
    close_to(traces, problem.trace)
    close_to(squares, problem.square)
    # Draw by draw against the error that was made, so that only what the two do not share is left as noise.
    close_to(list(np.array(estimated_errors) - errors + np.mean(errors)), float(np.mean(errors)))


def test_equal_windows_give_the_formulas_of_the_paper() -> None:
    # Appendix A.1, with one window as the small batch and all of them as the large one.
    random = np.random.default_rng(1)
    windows = random.normal(size=(5, 7)) + 1
    small, large = 12.0, 60.0
    small_square = float(np.mean(np.sum(windows**2, axis=1)))
    large_square = float(np.sum(windows.mean(axis=0) ** 2))
    noise = gradient_noise([small] * 5, np.sum(windows**2, axis=1), large_square)
    squared_gradient = (large * large_square - small * small_square) / (large - small)
    trace = (small_square - large_square) / (1 / small - 1 / large)
    np.testing.assert_allclose((noise.trace, noise.squared_gradient), (trace, squared_gradient), rtol=1e-12)


@pytest.mark.parametrize("weights", [[5.0], [5.0, 0.0], [0.0, 0.0]])
def test_fewer_than_two_windows_tell_nothing(weights: list[float]) -> None:
    noise = gradient_noise(weights, [1.0] * len(weights), 1.0)
    assert all(math.isnan(value) for value in (noise.trace, noise.squared_gradient, noise.squared_error))


@pytest.mark.parametrize("shares", [None, [1.0, 0.0, 1.0]])
def test_a_window_that_holds_nothing_has_no_say(shares: list[float] | None) -> None:
    noise = gradient_noise([5.0, 0.0, 5.0], [2.0, 9.0, 3.0], 1.5, shares)
    assert noise == gradient_noise([5.0, 5.0], [2.0, 3.0], 1.5)


def test_each_estimate_is_averaged_for_itself_and_corrected_for_the_start() -> None:
    random = np.random.default_rng(2)
    updates = [GradientNoise(*random.uniform(1, 9, size=3)) for _ in range(30)]
    scale = NoiseScale(smoothing=0.9)
    for update in updates:
        scale.add(update)
    ages = 0.9 ** np.arange(30)[::-1]
    trace = np.average([update.trace for update in updates], weights=ages)
    square = np.average([update.squared_gradient for update in updates], weights=ages)
    np.testing.assert_allclose((scale.trace, scale.squared_gradient, scale.value), (trace, square, trace / square))


def test_the_scale_is_unknown_at_first_and_while_noise_drowns_the_gradient() -> None:
    scale = NoiseScale()
    assert math.isnan(scale.value)
    scale.add(GradientNoise(4.0, -1.0, 1.0))
    assert math.isnan(scale.value)
    scale.add(GradientNoise(4.0, 3.0, 1.0))
    assert scale.value > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_the_average_alone(bad: float) -> None:
    scale = NoiseScale()
    scale.add(GradientNoise(4.0, 2.0, 1.0))
    scale.add(GradientNoise(bad, 2.0, 1.0))
    scale.add(GradientNoise(4.0, bad, 1.0))
    assert scale.value == 2.0


def test_state_goes_through_json_and_the_restored_scale_goes_on_alike() -> None:
    random = np.random.default_rng(3)
    scale, restored = NoiseScale(), NoiseScale()
    restored.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert math.isnan(restored.value)
    for _ in range(3):
        scale.add(GradientNoise(*random.uniform(1, 9, size=3)))
    restored.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for one in (scale, restored):
        one.add(GradientNoise(2.0, 3.0, 1.0))
    assert restored.value == scale.value


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_an_impossible_smoothing_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="smoothing"):
        NoiseScale(smoothing)


def test_on_a_language_model_it_is_within_20_percent_of_single_example_gradients() -> None:
    # Examples are drawn with replacement from those whose gradients are measured one by one, so that the mean and the
    # covariance over these are the very ones that the windows are drawn from.
    data = language_data(512)
    tokens = len(data[0]["input_ids"]) - 1
    model = make("gpt2").eval()
    parameters = list(model.parameters())

    def gradients(rows: NDArray[np.int64]) -> None:
        model.zero_grad()
        model(**{key: torch.stack([data[row][key] for row in rows]) for key in ("input_ids", "labels")}).loss.backward()

    def flat() -> torch.Tensor:
        return torch.cat([parameter.grad.reshape(-1) for parameter in parameters]).double()

    # A few steps of training, after which the noise is no longer small against the gradient.
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    random = np.random.default_rng(4)
    for _ in range(30):
        gradients(random.integers(len(data), size=16))
        optimizer.step()

    mean, mean_square = torch.zeros_like(flat()), 0.0
    for row in range(len(data)):
        gradients(np.array([row]))
        mean += flat() / len(data)
        mean_square += float(flat() @ flat()) / len(data)
    square = float(mean @ mean)
    direct = (mean_square - square) / square  # in examples
    assert direct > 1

    accumulator = Accumulator(Fixed(4), parameters, [name for name, _ in model.named_parameters()])
    for step in range(4 * 250):
        gradients(random.integers(len(data), size=8))
        accumulator.take(Measurement(parameters).norms(), weight=8 * tokens, step=step)
    assert accumulator.noise_scale / tokens == pytest.approx(direct, rel=0.2)
