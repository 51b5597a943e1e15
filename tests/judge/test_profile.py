"""A profile says how the gradient changes with depth, whatever odd layers, zeros and gaps there are."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest

from hf_gradguard.judge import depth_profile


@pytest.mark.parametrize("layers", [2, 5, 64, 65, 1000])
@pytest.mark.parametrize("decay", [0.7, 1.0, 1.3])
def test_decay_of_a_clean_line_is_the_one_of_a_least_squares_fit(layers: int, decay: float) -> None:
    norms = np.clip(3.0 * decay ** (layers - 1.0 - np.arange(layers)), 1e-290, 1e290)[None]
    inside = (norms[0] > 1e-290) & (norms[0] < 1e290)
    depth = np.arange(layers)[inside]
    slope = np.polyfit(depth, np.log(norms[0, inside]), 1)[0]
    profile = depth_profile(np.where(inside, norms, np.nan))
    assert profile.decay_per_layer == pytest.approx(np.exp(-slope), rel=1e-9)
    assert profile.decay_per_layer == pytest.approx(decay, rel=1e-9)


def test_decay_is_the_median_slope_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(size=11)
    slopes = [(logs[j] - logs[i]) / (j - i) for i, j in itertools.combinations(range(11), 2)]
    profile = depth_profile(np.exp(logs)[None])
    assert np.log(profile.decay_per_layer) == pytest.approx(-statistics.median(slopes), rel=1e-12)


@pytest.mark.parametrize("layers", [20, 400])
def test_a_fifth_of_odd_layers_hardly_moves_the_decay(layers: int) -> None:
    rng = np.random.default_rng(1)
    logs = 0.1 * np.arange(layers) + rng.normal(scale=0.01, size=layers)
    odd = rng.choice(layers, layers // 5, replace=False)
    logs[odd] += rng.choice([-20.0, 20.0], odd.size)
    assert depth_profile(np.exp(logs)[None]).decay_per_layer == pytest.approx(np.exp(-0.1), rel=0.03)


def test_levels_are_medians_on_the_log_scale_of_the_updates_with_a_gradient() -> None:
    nan = np.nan
    norms = np.array(
        [[1.0, nan, 0.0, 0.0, nan], [4.0, 8.0, 0.0, 5.0, nan], [9.0, 2.0, 0.0, 5.0, nan], [100, nan, nan, nan, nan]]
    )
    profile = depth_profile(norms)
    np.testing.assert_allclose(profile.levels, [6.0, 4.0, 0.0, 5.0, nan], rtol=1e-12)
    assert profile.dead.tolist() == [2]
    assert profile.alive.tolist() == [0, 1, 3]


def test_shares_are_those_of_the_squares() -> None:
    profile = depth_profile([[3.0, 4.0, np.nan, 0.0, 12.0]])
    np.testing.assert_allclose(profile.share, [9 / 169, 16 / 169, np.nan, 0.0, 144 / 169], rtol=1e-12)


def test_zeros_and_gaps_take_no_part_in_the_fit_and_the_ratios() -> None:
    norms = 2.0 ** np.arange(20.0)[None]
    norms[0, [0, 7]] = 0.0
    norms[0, [4, 19]] = np.nan
    profile = depth_profile(norms)
    assert profile.decay_per_layer == pytest.approx(0.5, rel=1e-12)
    assert profile.first_to_last == pytest.approx(2.0**-17, rel=1e-12)
    assert profile.dead.tolist() == [0, 7]


def test_ends_are_compared_without_the_odd_layer_at_either_end() -> None:
    norms = np.full((1, 40), 2.0)
    norms[0, 0], norms[0, -1] = 200.0, 1e-3
    profile = depth_profile(norms)
    assert profile.first_to_last == pytest.approx(2e5, rel=1e-12)
    assert profile.bottom_to_top == pytest.approx(1.0, rel=1e-12)


def test_starving_layers_are_those_under_the_share_of_the_healthy_top() -> None:
    norms = np.array([1e-7, 1e-6, 1e-5, 9e-4, 1.1e-3, 0.1, 1.0, 1.0])[None]
    assert depth_profile(norms).starving == 4
    assert depth_profile(norms, starving_share=2e-6).starving == 2
    assert depth_profile(np.ones((1, 8))).starving is None


def test_ratios_of_one_layer_or_none_are_not_a_number() -> None:
    for norms in ([[2.0]], [[0.0, 2.0, np.nan]], [[0.0, 0.0]], [[np.nan]]):
        profile = depth_profile(norms)
        assert all(np.isnan(value) for value in (profile.decay_per_layer, profile.first_to_last, profile.bottom_to_top))
        assert profile.starving is None


def test_ratios_stay_finite_at_the_ends_of_the_range() -> None:
    profile = depth_profile([[1e300, 1e-300]])
    assert np.isfinite([profile.first_to_last, profile.bottom_to_top, profile.decay_per_layer]).all()
    np.testing.assert_allclose(profile.share, [1.0, 0.0])


@pytest.mark.parametrize(
    ("norms", "words"),
    [([1.0, 2.0], "shape"), ([[np.inf, 1.0]], "infinite"), ([[-1.0, 1.0]], "negative"), ([[]], "shape")],
)
def test_what_is_no_array_of_norms_is_refused_with_the_reason(norms: list[object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        depth_profile(norms)
