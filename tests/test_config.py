"""One configuration, the same from Python, YAML and JSON; a wrong one is told what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_gradguard import GradGuardCallback, GradGuardConfig
from hf_gradguard.judge import Thresholds


@pytest.mark.parametrize("name", ["guard.yaml", "guard.yml", "guard.json"])
def test_a_saved_configuration_loads_equal(name: str, tmp_path: Path) -> None:
    config = GradGuardConfig(nonfinite="stop", record_every=5, thresholds=Thresholds(window=30))
    config.save(tmp_path / name)
    assert GradGuardConfig.load(tmp_path / name) == config


def test_options_of_the_callback_win_over_its_configuration() -> None:
    callback = GradGuardCallback(GradGuardConfig(nonfinite="stop", log_layers=True), nonfinite="observe")
    assert callback.config == GradGuardConfig(nonfinite="observe", log_layers=True)


def test_yaml_written_by_hand_needs_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("nonfinite: skip:max_consecutive=5\nthresholds:\n  window: 40\n")
    expected = GradGuardConfig(nonfinite="skip:max_consecutive=5", thresholds=Thresholds(window=40))
    assert GradGuardConfig.load(tmp_path / "guard.yaml") == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nonfinit": "skip"}, ["unknown option 'nonfinit'", "did you mean 'nonfinite'?"]),
        ({"nonfinite": "skipp"}, ["did you mean 'skip'?"]),
        ({"record_every": 0}, ["record_every=0 must be a whole number from 1, or 'auto'"]),
        ({"record_every": "often"}, ["record_every='often'"]),
        ({"weights_every": -1}, ["weights_every=-1"]),
        ({"time_profile_every": 0.5}, ["time_profile_every=0.5 must be a whole number from 0"]),
        ({"flush_seconds": float("nan")}, ["flush_seconds=nan"]),
        ({"record": "yes"}, ["record='yes' must be true or false"]),
        ({"thresholds": {"windw": 3}}, ["unknown option thresholds.'windw'", "did you mean 'window'?"]),
        ({"thresholds": {"window": 0}}, ["window=0"]),
        ({"thresholds": 3}, ["thresholds=3"]),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_remedy(options: dict[str, Any], words: list[str]) -> None:
    for make in (GradGuardConfig.from_dict, lambda given: GradGuardCallback(**given)):
        with pytest.raises(ValueError, match=r"[a-z]") as error:
            make(options)
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "a: [1"), ("b.json", "{"), ("c.yaml", "- 1"), ("d.yaml", "x: 1")]
)
def test_an_unreadable_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        GradGuardConfig.load(tmp_path / name)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert GradGuardConfig.load(tmp_path / "empty.yaml") == GradGuardConfig()
