"""Options reach what they are for, in the same way from the command line and from a file; a wrong one is told."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_gradguard import GradGuardConfig
from hf_gradguard.training import arguments
from hf_gradguard.training.arguments import DataArguments, ModelArguments, RecipeArguments


@dataclass
class Own:
    """What one recipe has of its own."""

    share: float = 0.5


BASE = {"output_dir": "out", "model_type": "gpt2", "dataset_name": "builtin:sotu"}


def parse(*words: str) -> tuple[ModelArguments, DataArguments, RecipeArguments, GradGuardConfig, Own]:
    base = [word for name, value in BASE.items() for word in (f"--{name}", value)]
    return arguments.parse(Own, [*base, *words])


def parse_file(path: Path, options: dict[str, Any], *, is_whole: bool = False) -> tuple[Any, ...]:
    options = options if is_whole else {**BASE, **options}
    text = json.dumps(options) if path.suffix == ".json" else yaml.safe_dump(options)
    path.write_text(text, encoding="utf-8")
    return arguments.parse(Own, [str(path)])


GUARD: dict[str, tuple[str, Any]] = {
    "nonfinite": ("skip:max_consecutive=3", "skip:max_consecutive=3"),
    "clip": ("global:max_norm=0.5", "global:max_norm=0.5"),
    "accumulate": ("fixed:windows=2", "fixed:windows=2"),
    "lr_schedule": ("updates", "updates"),
    "noise_smoothing": ("0.5", 0.5),
    "dry_run": ("true", True),
    "replay": ("false", False),
    "save_batch": ("true", True),
    "record": ("false", False),
    "record_dir": ("elsewhere", "elsewhere"),
    "record_every": ("7", 7),
    "flush_seconds": ("0.25", 0.25),
    "weights_every": ("5", 5),
    "time_profile_every": ("9", 9),
    "log_layers": ("true", True),
    "check_loss_scaling": ("false", False),
}
"""An option of the guard as text, and the value that it must have then."""
NEEDS = {"lr_schedule": ("--accumulate", "fixed:windows=2")}


def test_each_option_of_the_guard_is_tried_here() -> None:
    names = {field.name for field in dataclasses.fields(GradGuardConfig)}
    assert names == {*GUARD, "thresholds"}, "thresholds is a mapping and comes from --guard_config alone"


@pytest.mark.parametrize("name", GUARD)
def test_an_option_of_the_guard_reaches_it_from_the_command_line_and_alone(name: str) -> None:
    text, value = GUARD[name]
    guard = parse(f"--{name}", text, *NEEDS.get(name, ()))[3]
    assert getattr(guard, name) == value
    assert type(getattr(guard, name)) is type(value)
    assert getattr(GradGuardConfig(), name) != value, "the value tried must not be the default"
    others = {key: item for key, item in dataclasses.asdict(guard).items() if key not in (name, "accumulate")}
    default = dataclasses.asdict(GradGuardConfig())
    assert others == {key: default[key] for key in others}


def test_all_options_of_the_guard_reach_it_from_a_file(tmp_path: Path) -> None:
    given = {name: value for name, (_, value) in GUARD.items() if name != "save_batch"}
    guard = parse_file(tmp_path / "run.yaml", given)[3]
    assert {name: getattr(guard, name) for name in given} == given


def test_a_switch_alone_means_true_and_may_be_given_as_false() -> None:
    assert parse("--dry_run")[3].dry_run
    assert not parse("--dry_run", "false")[3].dry_run
    assert not parse("--record=false")[3].record


def test_options_on_the_command_line_win_over_the_guards_file(tmp_path: Path) -> None:
    path = tmp_path / "guard.yaml"
    GradGuardConfig.from_dict({"clip": "zclip", "weights_every": 3, "thresholds": {"exploding": 50.0}}).save(path)
    guard = parse("--guard_config", str(path), "--clip", "agc")[3]
    assert (guard.clip, guard.weights_every, guard.thresholds.exploding) == ("agc", 3, 50.0)


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("--clip", "zlip"), "zclip"),
        (("--accumulate", "fixd:windows=2"), "fixed"),
        (("--accumulate", "fixed:window=2"), "windows"),
        (("--nonfinite", "skp"), "skip"),
        (("--patch", "rezer"), "rezero"),
        (("--patch", "residual=layerscal:init=0.1"), "layerscale"),
        (("--learning_rat", "1"), "--learning_rate"),
        (("--learning-rat=1",), "--learning_rate"),
        (("--cli", "zclip"), "--clip"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(words: tuple[str, ...], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {nearest!r}"):
        parse(*words)


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "run.json"])
def test_a_file_stands_for_the_command_line(tmp_path: Path, name: str) -> None:
    words = (
        *("--learning_rate", "1e-3", "--max_steps", "-1", "--warmup_steps", "0.1", "--logging_steps", "3"),
        *("--share", "0.25", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--bf16", "false", "--save_strategy", "no"),
        *("--lr_scheduler_type", "cosine", "--clip", "none", "--max_eval_samples", "4", "--label_names", "a", "b"),
    )
    options = {
        "learning_rate": "1e-3",  # which YAML takes for text
        "max_steps": -1,
        "warmup_steps": 0.1,
        "logging_steps": 3,
        "share": 0.25,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "bf16": False,
        "save_strategy": False,  # what YAML makes of a bare no
        "lr_scheduler_type": "cosine",
        "clip": "none",
        "max_eval_samples": 4,
        "label_names": ["a", "b"],
        "tokenizer_name": None,
    }
    one, other = parse(*words), parse_file(tmp_path / name, options)
    assert one[2].learning_rate == 1e-3
    assert one[2].lr_scheduler_kwargs == {"num_cycles": 2}
    for mine, its in zip(one, other, strict=True):
        assert dataclasses.asdict(mine) == dataclasses.asdict(its)


def test_one_file_of_text_may_stand_in_yaml_without_a_list(tmp_path: Path) -> None:
    base = {"output_dir": "out", "model_type": "gpt2"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**base, "train_file": "a.txt"}))
    assert arguments.parse(Own, [str(tmp_path / "run.yaml")])[1].train_file == ["a.txt"]
    found = parse_file(tmp_path / "run.yaml", {**base, "train_file": ["a.txt", "b.txt"]}, is_whole=True)
    assert found[1].train_file == ["a.txt", "b.txt"]
    assert found[1].source == "a.txt, b.txt"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.yaml", "clipp: zclip", "did you mean '--clip'"),
        ("run.yaml", "", "holds no options"),
        ("run.yaml", "a: [1", "can't be read as yaml"),
        ("run.json", "{", "can't be read as json"),
        ("run.json", "[1]", "holds no options"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        arguments.parse(Own, [str(tmp_path / name)])
    assert name in str(caught.value)


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        arguments.parse(Own, ["none.yaml"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model_name_or_path", "x"), "both are given"),
        (("--train_file", "a.txt"), "both are given"),
        (("--validation_file", "a.txt"), "--validation_file"),
        (("--validation_split_percentage", "0"), "--validation_split_percentage 0"),
        (("--validation_split_percentage", "100"), "--validation_split_percentage 100"),
        (("--max_train_samples", "0"), "--max_train_samples 0"),
        (("--shuffle_buffer", "0"), "--shuffle_buffer 0"),
        (("--preprocessing_num_workers", "0"), "--preprocessing_num_workers 0"),
        (("--streaming", "--max_train_samples", "3"), "--max_steps"),
        (("--early_stopping_patience", "2", "--eval_strategy", "no"), "--early_stopping_patience 2"),
        (("--early_stopping_patience", "2", "--save_strategy", "no"), "--early_stopping_patience 2"),
        (("--accumulate", "fixed:windows=2", "--nonfinite", "observe"), "contradicts"),
        (("--lr_schedule", "updates"), "lr_schedule"),
        (("--record_every", "often"), "record_every"),
        (("--learning_rate", "fast"), "--learning_rate"),
        (("--sample_by", "word"), "--sample_by"),
        (("--config_overrides",), "--config_overrides"),
    ],
)
def test_what_contradicts_or_does_not_fit_is_refused_in_one_message(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        parse(*words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--output_dir", "out", "--dataset_name", "builtin:sotu"), "neither is"),
        (("--output_dir", "out", "--model_type", "gpt2"), "neither is"),
        (("--model_type", "gpt2", "--dataset_name", "builtin:sotu"), "--output_dir is missing"),
        (("--model_type", "gpt2", "--train_file", "a.txt", "--dataset_config_name", "b"), "--dataset_config_name"),
    ],
)
def test_what_is_missing_is_told(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        arguments.parse(Own, words)


def test_the_best_checkpoint_is_kept_where_each_evaluation_has_one() -> None:
    assert parse()[2].load_best_model_at_end
    assert not parse("--eval_strategy", "no")[2].load_best_model_at_end
    assert not parse("--save_strategy", "no")[2].load_best_model_at_end
    assert not parse("--load_best_model_at_end", "false")[2].load_best_model_at_end
    assert parse("--save_strategy", "best", "--eval_strategy", "steps")[2].load_best_model_at_end


def test_help_shows_an_example_and_all_kinds_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.parse(Own, ["--help"], "An example: python train.py")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in ("An example: python train.py", "--learning_rate", "--accumulate", "--train_file", "--share"):
        assert expected in text
    # The documentation of a field is its help.
    assert "How gradients are clipped" in text
