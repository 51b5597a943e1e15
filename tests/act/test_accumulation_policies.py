"""Each accumulation policy updates exactly when its definition says, and refuses what can't be."""

from __future__ import annotations

import dataclasses
import doctest
import math
from typing import Any

import numpy as np
import pytest

from hf_gradguard.act import accumulation
from hf_gradguard.act.accumulation import Fixed, Held, NoiseScaleTarget, NormTest, NormThreshold, Ramp, policies

NAN = math.nan


def held(**known: Any) -> Held:
    """What is held after the first window of a run, but for what is given."""
    first = Held(
        step=1, windows=1, weight=10.0, window_norm=1.0, norm=1.0, variance=NAN, mean_norm=1.0, noise_scale=NAN,
        windows_seen=1, weight_seen=10.0,
    )  # fmt: skip
    return dataclasses.replace(first, **known)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("fixed", Fixed(4)),
        ("fixed:windows=3", Fixed(3)),
        ("norm_threshold:threshold=2.5", NormThreshold(2.5, 8, "mean")),
        ("norm_threshold:threshold=2,max_windows=16,reduce=sum", NormThreshold(2.0, 16, "sum")),
        ("noise_scale", NoiseScaleTarget(1.0, 2, 8)),
        ("noise_scale:fraction=0.5,min_windows=4,max_windows=64", NoiseScaleTarget(0.5, 4, 64)),
        ("norm_test:eta=0.1", NormTest(0.1, 2, 8)),
        ("ramp:start=2,end=32,over=1e9,unit=tokens", Ramp(2, 32, 1e9, "tokens")),
    ],
)
def test_the_text_form_says_what_the_object_says(text: str, policy: Any) -> None:
    assert policies.parse(text) == policy
    assert policies.parse(policies.text(policy)) == policy


def test_none_is_no_policy() -> None:
    assert policies.parse_optional("none") is None
    assert policies.names() == ["fixed", "noise_scale", "none", "norm_test", "norm_threshold", "ramp"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fixed:windows=0", "windows=0 must be a whole number of at least 1"),
        ("fixed:windows=2.5", "windows='2.5' must be of type int"),
        ("norm_threshold", "threshold must be given: write norm_threshold:threshold="),
        ("norm_threshold:threshold=0", "threshold=0.0 must be above 0"),
        ("norm_threshold:threshold=-1", "threshold=-1.0 must be above 0"),
        ("norm_threshold:threshold=nan", "threshold=nan must be above 0"),
        ("norm_threshold:threshold=inf", "threshold=inf must be above 0 and finite"),
        ("norm_threshold:threshold=1,max_windows=0", "max_windows=0 must be a whole number of at least 1"),
        ("norm_threshold:threshold=1,reduce=max", "reduce='max'.* must be one of mean, sum"),
        ("noise_scale:fraction=0", "fraction=0.0 must be above 0"),
        ("noise_scale:fraction=nan", "fraction=nan must be above 0"),
        ("noise_scale:min_windows=1", "min_windows=1 must be a whole number of at least 2"),
        ("noise_scale:min_windows=9", "min_windows=9 must not be above max_windows=8"),
        ("norm_test:eta=-0.5", "eta=-0.5 must be above 0"),
        ("norm_test:min_windows=1", "min_windows=1 must be a whole number of at least 2"),
        ("norm_test:min_windows=4,max_windows=3", "min_windows=4 must not be above max_windows=3"),
        ("ramp:start=0", "start=0 must be a whole number of at least 1"),
        ("ramp:start=9", "start=9 must not be above end=8"),
        ("ramp:over=0", "over=0.0 must be above 0"),
        ("ramp:unit=steps", "unit='steps'.* must be one of windows, tokens"),
    ],
)
def test_impossible_values_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        policies.parse(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fixed(2.0), "windows=2.0 must be a whole number"),
        (lambda: Fixed(True), "windows=True must be a whole number"),
        (lambda: NormThreshold("2"), "threshold='2' must be above 0"),
        (lambda: NormThreshold(2.0, reduce="max"), "reduce='max' must be 'mean' or 'sum'"),
        (lambda: Ramp(unit="steps"), "unit='steps' must be 'windows' or 'tokens'"),
    ],
)
def test_objects_are_refused_as_texts_are(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_fixed_updates_with_its_number_of_windows() -> None:
    choices = [Fixed(3).decide(held(windows=windows)) for windows in (1, 2, 3)]
    assert [choice.update for choice in choices] == [False, False, True]
    assert (choices[1].value, choices[1].threshold) == (2, 3)


def test_norm_threshold_updates_from_the_threshold_on_or_at_the_last_window() -> None:
    policy = NormThreshold(2.0, max_windows=3)
    assert [policy.decide(held(norm=norm)).update for norm in (0.0, 1.999, 2.0, 5.0)] == [False, False, True, True]
    assert [policy.decide(held(windows=windows)).update for windows in (2, 3)] == [False, True]
    assert policy.decide(held(norm=1.5)).value == 1.5


def test_noise_scale_updates_when_its_share_of_the_noise_scale_is_held() -> None:
    policy = NoiseScaleTarget(fraction=0.5, min_windows=2, max_windows=4)
    enough = {"noise_scale": 100.0, "weight": 50.0}
    assert not policy.decide(held(windows=1, **enough)).update
    assert policy.decide(held(windows=2, **enough)).update
    choice = policy.decide(held(windows=3, noise_scale=100.0, weight=49.0))
    assert (choice.update, choice.value, choice.threshold) == (False, 49.0, 50.0)
    assert policy.decide(held(windows=4, noise_scale=1e9)).update


def test_an_unknown_noise_scale_takes_as_many_windows_as_may_be() -> None:
    policy = NoiseScaleTarget(max_windows=4)
    assert [policy.decide(held(windows=windows, noise_scale=NAN)).update for windows in (1, 2, 3, 4)] == [
        False, False, False, True,
    ]  # fmt: skip


def test_norm_test_updates_when_the_error_is_small_against_the_mean() -> None:
    policy = NormTest(eta=0.5, min_windows=2, max_windows=4)
    assert not policy.decide(held(windows=1)).update
    assert policy.decide(held(windows=2, variance=1.0, mean_norm=2.0)).update
    choice = policy.decide(held(windows=2, variance=1.01, mean_norm=2.0))
    assert (choice.update, choice.value, choice.threshold) == (False, 1.01, 1.0)
    assert policy.decide(held(windows=4, variance=9.0)).update


@pytest.mark.parametrize("unit", ["windows", "tokens"])
def test_ramp_grows_linearly_by_windows_or_by_tokens(unit: str) -> None:
    policy = Ramp(start=2, end=5, over=30 if unit == "windows" else 30 * 7.0, unit=unit)  # type: ignore[arg-type]
    found, windows, begun = [], 0, 0
    for seen in range(1, 80):
        windows += 1
        view = held(windows=windows, weight=7.0 * windows, windows_seen=seen, weight_seen=7.0 * seen)
        if policy.decide(view).update:
            found.append((begun, windows))
            windows, begun = 0, seen
    assert found[0] == (0, 2)
    assert found[-1][1] == 5
    for before, size in found:
        assert size == math.floor(np.interp(before, [0, 30], [2, 5]))


def test_the_policy_of_the_documentation_is_registered_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_policies", dict(policies._policies))  # forgets it afterwards
    (example,) = doctest.DocTestFinder(recurse=False).find(accumulation)
    result = doctest.DocTestRunner().run(example, clear_globs=False)
    assert (result.failed, result.attempted > 0) == (0, True)
    policy = policies.parse("tokens:least=25")
    assert [policy.decide(held(weight=weight)).update for weight in (24.0, 25.0)] == [False, True]
    policy.load_state_dict(policy.state_dict())
