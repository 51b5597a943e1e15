"""What an accumulator leaves for the optimizer is the gradient of all windows together, when the policy says so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_gradguard.act.accumulation import (
    AccumulationPolicy,
    Accumulator,
    Choice,
    Fixed,
    Held,
    NoiseScaleTarget,
    NormTest,
    NormThreshold,
    Ramp,
    Taken,
)
from hf_gradguard.observe.norms import NO_GRADIENT, Measurement
from tests.counters import Counters
from tests.models import language_data, make
from tests.training import assert_bit_equal, weights

SHAPES = [(3,), (20, 30), (7, 2)]
SIZE = 3 + 600 + 14


class Loop:
    """Parameters that are given random gradients window by window, and an accumulator that takes them."""

    def __init__(self, policy: Any, *, shadow: bool = False) -> None:
        self.parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        self.accumulator = Accumulator(policy, self.parameters, ["a", "b", "c"], shadow=shadow)
        self.step = 0

    def window(self, gradient: NDArray[np.float64], weight: float = 1.0, **options: Any) -> Taken:
        """Takes a window of this gradient `[SIZE]`."""
        self.give(gradient)
        self.step += 1
        return self.accumulator.take(Measurement(self.parameters).norms(), weight, step=self.step, **options)

    def give(self, gradient: NDArray[np.float64]) -> None:
        parts = torch.from_numpy(gradient).float().split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.clone().view_as(parameter)

    def gradient(self) -> NDArray[np.float64] | None:
        """What is in `.grad` now, None where nothing is."""
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            return None
        return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None]).double().numpy()


def random_windows(count: int, seed: int, noise: float = 1.0) -> Iterator[tuple[NDArray[np.float64], float]]:
    """Gradients around a common mean, rounded to float32, and numbers of tokens."""
    random = np.random.default_rng(seed)
    mean = random.normal(size=SIZE)
    for _ in range(count):
        gradient = mean + noise * random.normal(size=SIZE)
        yield gradient.astype(np.float32).astype(np.float64), float(random.integers(1, 100))


def batch(rows: range) -> dict[str, Tensor]:
    data = language_data(rows.stop)
    return {key: torch.stack([data[row][key] for row in rows]) for key in ("input_ids", "labels")}


def padded(rows: range) -> tuple[dict[str, Tensor], int]:
    """Examples of unequal length, and how many target tokens they have."""
    found = batch(rows)
    for index, row in enumerate(rows):
        found["labels"][index, 3 + 5 * row % 14 :] = -100
    return found, int((found["labels"][:, 1:] != -100).sum())


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_four_equal_windows_are_bit_equal_to_torchs_own_accumulation(optimizer: str) -> None:
    stock, guarded = make("gpt2").eval(), make("gpt2").eval()
    stock_optimizer = OPTIMIZERS[optimizer](stock.parameters())
    guarded_optimizer = OPTIMIZERS[optimizer](guarded.parameters())
    parameters = list(guarded.parameters())
    accumulator = Accumulator(Fixed(4), parameters, [name for name, _ in guarded.named_parameters()])
    updates = 0
    for window in range(12):
        inputs = batch(range(4 * window, 4 * window + 4))
        (stock(**inputs).loss / 4).backward()
        guarded(**inputs).loss.backward()
        if accumulator.take(Measurement(parameters).norms(), 4 * 15, step=window + 1).update:
            guarded_optimizer.step()
            updates += 1
        guarded.zero_grad()
        if window % 4 == 3:
            stock_optimizer.step()
            stock.zero_grad()
    assert updates == 3
    assert_bit_equal(weights(guarded), weights(stock))


def test_padded_windows_give_the_gradient_of_one_large_batch() -> None:
    windows = [range(0, 3), range(3, 7), range(7, 8), range(8, 12)]
    joint, single = make("gpt2").eval(), make("gpt2").eval()
    joint(**padded(range(12))[0]).loss.backward()
    parameters = list(single.parameters())
    accumulator = Accumulator(Fixed(4), parameters, [name for name, _ in single.named_parameters()])
    sizes = set()
    for step, rows in enumerate(windows):
        inputs, tokens = padded(rows)
        sizes.add(tokens)
        single(**inputs).loss.backward()
        taken = accumulator.take(Measurement(parameters).norms(), tokens, step=step)
        if not taken.update:
            single.zero_grad()
    assert len(sizes) == 4
    assert taken.weight == padded(range(12))[1]
    expected, found = (
        torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]).double()
        for model in (joint, single)
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert taken.norm == pytest.approx(expected.norm().item(), rel=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(5))
def test_norm_threshold_updates_exactly_when_the_formula_says(reduce: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    threshold = random.uniform(30, 45) if reduce == "mean" else random.uniform(60, 110)
    loop = Loop(NormThreshold(threshold, max_windows=5, reduce=reduce))  # type: ignore[arg-type]
    total, tokens, windows = np.zeros(SIZE), 0.0, 0
    lengths = []
    for steady, weight in random_windows(60, seed):
        gradient = (steady * np.exp(random.normal() / 2)).astype(np.float32).astype(np.float64)
        # θ ← θ − η·G with G = Σ∇L, or G = Σ n∇L / Σ n, as soon as ‖G‖ reaches the threshold.
        share = weight if reduce == "mean" else 1.0
        total, tokens, windows = total + share * gradient, tokens + share, windows + 1
        accumulated = total / tokens if reduce == "mean" else total
        norm = float(np.sqrt(np.sum(accumulated**2)))
        taken = loop.window(gradient, weight)
        assert taken.update == (norm >= threshold or windows == 5)
        assert (taken.value, taken.norm) == (pytest.approx(norm, rel=1e-6), pytest.approx(norm, rel=1e-6))
        assert (taken.threshold, taken.windows) == (threshold, windows)
        found = loop.gradient()
        if taken.update:
            np.testing.assert_allclose(found, accumulated, rtol=1e-5, atol=1e-5)
            lengths.append(windows)
            total, tokens, windows = np.zeros(SIZE), 0.0, 0
        else:
            assert found is None
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("seed", range(3))
def test_norm_test_updates_exactly_when_the_formula_says(seed: int) -> None:
    loop = Loop(NormTest(eta=0.6, max_windows=6))
    held: list[NDArray[np.float64]] = []
    lengths = []
    for gradient, _ in random_windows(60, seed, noise=1.2):
        held.append(gradient)
        mean = np.mean(held, axis=0)
        passes = False
        if len(held) > 1:
            error = np.sum(np.var(held, axis=0, ddof=1)) / len(held)
            passes = bool(error <= 0.6**2 * np.sum(mean**2))
        taken = loop.window(gradient, 8.0)
        assert taken.update == (passes or len(held) == 6)
        if len(held) > 1:
            assert taken.value == pytest.approx(error, rel=1e-5)
        if taken.update:
            lengths.append(len(held))
            held = []
    assert len(set(lengths)) > 1


def test_noise_scale_goes_by_the_updates_before_this_one() -> None:
    loop = Loop(NoiseScaleTarget(fraction=1.0, max_windows=6))
    known, lengths = math.nan, []
    for gradient, _ in random_windows(80, seed=0, noise=1.5):
        taken = loop.window(gradient, 10.0)
        enough = taken.windows >= 2 and taken.weight >= known
        assert taken.update == (enough or taken.windows == 6)
        assert taken.threshold == pytest.approx(known, nan_ok=True)
        if taken.update:
            known = taken.noise_scale
            lengths.append(taken.windows)
    assert known == loop.accumulator.noise_scale
    # One token's noise is 10 × 1.5², so that 22.5 tokens are as noisy as the gradient.
    assert (lengths[0], lengths[-1]) == (6, 3)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_noise_scale_of_unequal_windows_is_the_same_for_mean_and_sum(reduce: str) -> None:
    random = np.random.default_rng(0)
    mean = random.normal(size=SIZE)
    loop = Loop(NormThreshold(1e6, max_windows=4, reduce=reduce))  # type: ignore[arg-type]
    for index in range(1200):
        tokens = (2.0, 50.0, 9.0, 25.0)[index % 4]
        taken = loop.window(mean + 6 * random.normal(size=SIZE) / math.sqrt(tokens), tokens)
    assert taken.noise_scale == pytest.approx(36 * SIZE / float(mean @ mean), rel=0.05)


@dataclass
class Recorder(AccumulationPolicy):
    """Updates with three windows, and keeps what it was shown."""

    reduce: str
    seen: list[Held] = field(default_factory=list)

    def decide(self, held: Held) -> Choice:
        self.seen.append(held)
        return Choice(held.windows == 3, 0.0, 0.0)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_policy_is_shown_what_is_held_and_what_went_before(reduce: str) -> None:
    loop = Loop(Recorder(reduce))
    windows = list(random_windows(7, seed=2))
    for gradient, weight in windows:
        loop.window(gradient, weight)
    for index, held in enumerate(loop.accumulator.policy.seen):  # type: ignore[attr-defined]
        gradients, sizes = zip(*windows[index - index % 3 : index + 1], strict=True)
        total = np.sum(gradients, axis=0)
        mean = np.average(gradients, axis=0, weights=sizes) if reduce == "mean" else total / len(gradients)
        assert (held.step, held.windows_seen, held.windows) == (index + 1, index + 1, len(gradients))
        assert (held.weight, held.weight_seen) == (sum(sizes), sum(weight for _, weight in windows[: index + 1]))
        assert held.window_norm == pytest.approx(np.linalg.norm(gradients[-1]), rel=1e-6)
        assert held.mean_norm == pytest.approx(np.linalg.norm(mean), rel=1e-6)
        assert held.norm == pytest.approx(np.linalg.norm(mean if reduce == "mean" else total), rel=1e-6)
        assert math.isnan(held.variance) == (len(gradients) == 1)
        assert math.isnan(held.noise_scale) == (index < 3)


def test_parameters_without_a_gradient_in_a_window_count_as_zero_there() -> None:
    loop = Loop(Fixed(2))
    first, second = (gradient for gradient, _ in random_windows(2, seed=0))
    loop.give(first)
    loop.parameters[0].grad = None
    loop.parameters[2].grad = None
    loop.accumulator.take(Measurement(loop.parameters).norms(), 3.0, step=1)
    loop.give(second)
    loop.parameters[1].grad = None
    loop.parameters[2].grad = None
    taken = loop.accumulator.take(Measurement(loop.parameters).norms(), 1.0, step=2)
    found = loop.gradient()
    np.testing.assert_allclose(found, np.concatenate([second[:3] / 4, 3 * first[3:603] / 4]), rtol=1e-6)
    expected = [np.linalg.norm(second[:3]) / 4, 3 * np.linalg.norm(first[3:603]) / 4, NO_GRADIENT]
    np.testing.assert_allclose(taken.norms, expected, rtol=1e-6)


def test_a_window_that_updates_at_once_costs_nothing() -> None:
    loop = Loop(Ramp(start=1, end=8, over=1000))
    (gradient, weight) = next(random_windows(1, seed=0))
    loop.give(gradient)
    before = [parameter.grad for parameter in loop.parameters]
    norms = Measurement(loop.parameters).norms()
    with Counters(loop.parameters) as counters:
        taken = loop.accumulator.take(norms, weight, step=1)
    assert not counters.counts
    assert all(parameter.grad is one for parameter, one in zip(loop.parameters, before, strict=True))
    assert (taken.update, taken.gradient_was_replaced, taken.windows) == (True, False, 1)
    assert taken.norms.tolist() == norms.tolist()
    assert loop.accumulator.tensors() == {}


def test_the_final_window_updates_with_all_that_is_held() -> None:
    loop = Loop(Fixed(10))
    windows = [gradient for gradient, _ in random_windows(3, seed=1)]
    taken = [loop.window(gradient, final=index == 2) for index, gradient in enumerate(windows)]
    assert [one.update for one in taken] == [False, False, True]
    assert (taken[2].windows, taken[2].value, taken[2].threshold) == (3, 3, 10)
    np.testing.assert_allclose(loop.gradient(), np.mean(windows, axis=0), rtol=1e-5, atol=1e-6)
    assert loop.accumulator.windows == 0


def test_a_first_window_that_is_final_is_left_as_it_is() -> None:
    loop = Loop(Fixed(10))
    (gradient, weight) = next(random_windows(1, seed=1))
    taken = loop.window(gradient, weight, final=True)
    assert (taken.update, taken.gradient_was_replaced) == (True, False)
    np.testing.assert_array_equal(loop.gradient(), gradient)


def test_finish_leaves_what_is_held_in_place_of_a_bad_window() -> None:
    loop = Loop(Fixed(10))
    windows = [gradient for gradient, _ in random_windows(2, seed=1)]
    for gradient in windows:
        loop.window(gradient)
    loop.give(np.full(SIZE, np.nan))
    taken = loop.accumulator.finish()
    assert taken is not None
    assert (taken.update, taken.windows, taken.gradient_was_replaced) == (True, 2, True)
    mean = np.mean(windows, axis=0)
    np.testing.assert_allclose(loop.gradient(), mean, rtol=1e-5, atol=1e-6)
    assert taken.norm == pytest.approx(float(np.linalg.norm(mean)), rel=1e-6)
    assert math.isnan(taken.value)
    assert loop.accumulator.finish() is None


def test_discard_drops_what_is_held_and_says_how_much() -> None:
    loop = Loop(Fixed(3))
    windows = [gradient for gradient, _ in random_windows(5, seed=1)]
    for gradient in windows[:2]:
        loop.window(gradient)
    assert loop.accumulator.discard() == 2
    assert (loop.accumulator.windows, loop.accumulator.discard(), loop.accumulator.tensors()) == (0, 0, {})
    taken = [loop.window(gradient) for gradient in windows[2:]]
    assert [one.update for one in taken] == [False, False, True]
    np.testing.assert_allclose(loop.gradient(), np.mean(windows[2:], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_windows_without_a_target_token_add_nothing(reduce: str) -> None:
    loop = Loop(NormThreshold(1e6, max_windows=4, reduce=reduce))  # type: ignore[arg-type]
    windows = [gradient for gradient, _ in random_windows(4, seed=1)]
    for gradient, weight in zip(windows, [0.0, 6.0, 0.0, 2.0], strict=True):
        taken = loop.window(gradient, weight)
    expected = (6 * windows[1] + 2 * windows[3]) / 8 if reduce == "mean" else windows[1] + windows[3]
    np.testing.assert_allclose(loop.gradient(), expected, rtol=1e-5, atol=1e-6)
    assert (taken.windows, taken.weight) == (4, 8.0)
    for gradient in windows:
        taken = loop.window(gradient, 0.0)
    assert taken.update
    assert loop.gradient() is None


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_an_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight=.* of window 1 must be a number of target tokens from 0"):
        Loop(Fixed(2)).window(np.ones(SIZE), weight)


POLICIES = [
    Fixed(3), NormThreshold(31.0), NormThreshold(100.0, reduce="sum"), NoiseScaleTarget(), NormTest(), Ramp(over=20),
    Ramp(over=900, unit="tokens"),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_shadow_decides_alike_and_never_touches_a_gradient(policy: Any) -> None:
    loop, shadow = Loop(policy), Loop(policy, shadow=True)
    for gradient, weight in random_windows(40, seed=3):
        taken = loop.window(gradient, weight)
        seen = shadow.window(gradient, weight)
        for name in ("update", "value", "threshold", "windows", "weight", "norm", "noise_scale"):
            np.testing.assert_equal(getattr(seen, name), getattr(taken, name), err_msg=name)
        assert not seen.gradient_was_replaced
        np.testing.assert_array_equal(shadow.gradient(), gradient)
    for gradient, weight in random_windows(2, seed=4):
        shadow.window(gradient, weight)
    shadow.accumulator.finish()
    np.testing.assert_array_equal(shadow.gradient(), gradient)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("saved_at", [7, 8, 9])
def test_a_run_resumed_in_the_middle_of_a_deferral_is_bit_equal(policy: Any, saved_at: int, tmp_path: Path) -> None:
    loop, resumed = Loop(policy), Loop(policy)
    for index, (gradient, weight) in enumerate(random_windows(30, seed=5)):
        if index == saved_at:
            save_file(loop.accumulator.tensors(), tmp_path / "held.safetensors")
            resumed.accumulator.load_state_dict(json.loads(json.dumps(loop.accumulator.state_dict())))
            resumed.accumulator.load_tensors(load_file(tmp_path / "held.safetensors"))
            assert resumed.accumulator.windows == loop.accumulator.windows
        taken = loop.window(gradient, weight)
        if index >= saved_at:
            again = resumed.window(gradient, weight)
            assert again.update == taken.update
            np.testing.assert_equal(vars(again), vars(taken))
            np.testing.assert_equal(resumed.gradient(), loop.gradient())


@pytest.mark.parametrize("lost", ["tensors", "state"])
def test_half_of_what_was_saved_is_as_good_as_nothing(lost: str) -> None:
    loop, resumed = Loop(Fixed(3)), Loop(Fixed(3))
    windows = [gradient for gradient, _ in random_windows(5, seed=6)]
    for gradient in windows[:2]:
        loop.window(gradient)
    if lost == "tensors":
        resumed.accumulator.load_state_dict(loop.accumulator.state_dict())
        resumed.accumulator.load_tensors({})
    else:
        resumed.accumulator.load_tensors(loop.accumulator.tensors())
    assert (resumed.accumulator.windows, resumed.accumulator.tensors()) == (0, {})
    taken = [resumed.window(gradient) for gradient in windows[2:]]
    assert [one.update for one in taken] == [False, False, True]
    np.testing.assert_allclose(resumed.gradient(), np.mean(windows[2:], axis=0), rtol=1e-5, atol=1e-6)
