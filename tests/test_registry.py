"""The text form of a policy says what the object says, and a misspelt one is told what would fit."""

from __future__ import annotations

import pytest

from hf_gradguard.act.nonfinite import Observe, Skip, Stop, policies


@pytest.mark.parametrize(
    ("text", "policy"),
    [("skip", Skip()), ("skip:max_consecutive=3", Skip(3)), (" skip: max_consecutive = 3 ", Skip(3)), ("stop", Stop())],
)
def test_text_and_object_are_the_same_policy(text: str, policy: object) -> None:
    assert policies.parse(text) == policy
    assert policies.parse(policies.text(policies.parse(text))) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("skp", ["unknown nonfinite policy 'skp'", "did you mean 'skip'?", "Known: observe, skip, stop"]),
        ("skip:max=3", ["unknown option 'max'", "Known: max_consecutive"]),
        ("skip:max_consecutive", ["'max_consecutive' is not of the form key=value"]),
        ("skip:max_consecutive=many", ["max_consecutive='many' must be of type int"]),
        ("skip:max_consecutive=0", ["max_consecutive=0 must be a whole number of at least 1"]),
        ("stop:now=1", ["unknown option 'now'", "It takes no options"]),
    ],
)
def test_a_wrong_text_is_told_what_would_fit(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="nonfinite") as error:
        policies.parse(text)
    for word in words:
        assert word in str(error.value)


def test_an_object_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="is no nonfinite policy"):
        policies.parse(3)  # type: ignore[arg-type]


def test_skip_stops_after_so_many_windows_in_a_row_and_no_fewer() -> None:
    policy = Skip(max_consecutive=3)
    found = [policy.decide(bad) for bad in (True, True, False, True, True, True)]
    assert found == ["skip", "skip", None, "skip", "skip", "stop"]


def test_a_restored_skip_goes_on_counting() -> None:
    policy, restored = Skip(max_consecutive=3), Skip(max_consecutive=3)
    for _ in range(2):
        policy.decide(True)
    restored.load_state_dict(policy.state_dict())
    assert restored.decide(True) == "stop"


def test_observe_never_acts() -> None:
    assert [Observe().decide(bad) for bad in (True, False)] == ["observe", None]


def test_the_classes_of_all_policies_can_be_listed() -> None:
    assert policies.classes() == {"observe": Observe, "skip": Skip, "stop": Stop}
