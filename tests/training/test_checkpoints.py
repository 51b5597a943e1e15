"""A checkpoint that a kill has left unfinished is never taken for a whole one, nor a folder for that of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gradguard.training.checkpoints import OWN_FILE, Processes, claim, last_whole, set_aside, what_is_broken
from tests.training.runs import run

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
)
NEEDED = ("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
"""Those without which a training does not go on as it would have."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Trainer writes it."""
    folder = tmp_path_factory.mktemp("run")
    run("clm", folder, max_steps="2", save_steps="2", eval_steps="2")
    return folder / "out" / "checkpoint-2"


@pytest.fixture
def checkpoint(real: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real, tmp_path / "out" / "checkpoint-2"))


def test_a_real_checkpoint_is_whole_and_has_the_files_that_are_tried_here(checkpoint: Path) -> None:
    assert what_is_broken(checkpoint) is None
    assert {path.name for path in checkpoint.iterdir()} == set(FILES)
    assert last_whole(str(checkpoint.parent)) == checkpoint


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_anywhere_is_recognised(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    text = content.rstrip()  # a line's end is no content
    for length in sorted({0, 1, 2, 10, len(text) // 4, len(text) // 2, len(text) - 100, len(text) - 2, len(text) - 1}):
        path.write_bytes(content[:length])
        assert what_is_broken(checkpoint) == f"{name} is cut off", length
        assert last_whole(str(checkpoint.parent)) is None
    path.write_bytes(content)
    assert what_is_broken(checkpoint) is None


@pytest.mark.parametrize(
    "name",
    NEEDED,
)
def test_a_file_that_is_gone_is_recognised(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    assert name in (what_is_broken(checkpoint) or "")


def test_a_folder_in_a_checkpoint_is_looked_into(checkpoint: Path) -> None:
    (checkpoint / "global_step2").mkdir()
    torch.save({"a": torch.zeros(100)}, checkpoint / "global_step2" / "states.pt")
    assert what_is_broken(checkpoint) is None
    content = (checkpoint / "global_step2" / "states.pt").read_bytes()
    (checkpoint / "global_step2" / "states.pt").write_bytes(content[:-5])
    assert what_is_broken(checkpoint) == "global_step2/states.pt is cut off"


def test_weights_in_several_files_must_all_be_there(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=261))
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert what_is_broken(checkpoint) is None
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        assert what_is_broken(checkpoint) == f"{shard.name} is missing"
        shard.write_bytes(content[: len(content) // 2])
        assert what_is_broken(checkpoint) == f"{shard.name} is cut off"
        shard.write_bytes(content)
    index = checkpoint / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes()[:50])
    assert what_is_broken(checkpoint) == f"{index.name} is cut off"


def of_two_processes(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["Processes"] = Processes(2).state()
    path.write_text(json.dumps(state))
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()


@pytest.mark.parametrize(
    "missing",
    ["rng_state_0.pth", "rng_state_1.pth"],
)
def test_of_two_processes_each_must_have_written(missing: str, checkpoint: Path) -> None:
    of_two_processes(checkpoint)
    assert what_is_broken(checkpoint) is None
    (checkpoint / missing).unlink()
    assert what_is_broken(checkpoint) == f"{missing} is missing"


def test_how_many_processes_write_is_kept_in_the_checkpoint(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Processes"]["args"] == {"count": 1}
    assert Processes(**Processes(3).state()["args"]).count == 3


# The output folder


def copies(checkpoint: Path, *updates: int) -> Path:
    for update in updates:
        shutil.copytree(checkpoint, checkpoint.with_name(f"checkpoint-{update}"))
    return checkpoint.parent


def spoil(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def test_the_newest_whole_one_is_taken_by_its_number(checkpoint: Path) -> None:
    out = copies(checkpoint, 10, 9, 100)
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-7.bak").mkdir()
    (out / "incomplete-checkpoint-200").mkdir()
    for expected in (100, 10, 9, 2):
        assert last_whole(str(out)) == out / f"checkpoint-{expected}"
        spoil(out / f"checkpoint-{expected}")
    assert last_whole(str(out)) is None
    assert last_whole(str(out / "none")) is None


def test_what_is_not_whole_is_set_aside_and_the_rest_is_left(checkpoint: Path) -> None:
    out = copies(checkpoint, 4, 6)
    spoil(out / "checkpoint-6")
    content = (out / "checkpoint-2" / "optimizer.pt").read_bytes()
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(content[:50])
    lines = set_aside(str(out))
    assert [line.split(":")[0] for line in lines] == [
        "checkpoint-2 is not whole (optimizer.pt is cut off)",
        "checkpoint-6 is not whole (no trainer_state.json, which is written last)",
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-4",
        "incomplete-checkpoint-2",
        "incomplete-checkpoint-6",
    ]
    assert set_aside(str(out)) == []


def test_one_that_was_set_aside_before_makes_room(checkpoint: Path) -> None:
    out = checkpoint.parent
    for mark in ("first", "second"):
        if mark == "second":
            shutil.copytree(out / "incomplete-checkpoint-2", checkpoint)
        (checkpoint / "mark").write_text(mark)
        (checkpoint / "trainer_state.json").unlink(missing_ok=True)
        set_aside(str(out))
        assert (out / "incomplete-checkpoint-2" / "mark").read_text() == mark
        assert not checkpoint.exists()


OPTIONS = {"train_file": ["a.txt"], "seed": 1, "block_size": None, "share": 0.15}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_new_or_empty_folder_is_taken_and_by_the_main_process_alone(is_there: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if is_there:
        out.mkdir(parents=True)
    claim(str(out), OPTIONS, is_main=False)
    assert out.exists() == is_there
    claim(str(out), OPTIONS, is_main=True)
    assert json.loads((out / OWN_FILE).read_text()) == OPTIONS
    assert [path.name for path in out.iterdir()] == [OWN_FILE]


def test_the_same_run_may_go_on_and_another_may_not(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    claim(out, OPTIONS, is_main=True)
    claim(out, dict(OPTIONS), is_main=True)
    changes: dict[str, Any] = {"seed": 2, "block_size": 64, "train_file": ["b.txt"], "share": 0.2}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"holds a run with --{name} ") as caught:
            claim(out, {**OPTIONS, name: value}, is_main=True)
        assert str(value) in str(caught.value)
    assert json.loads(Path(out, OWN_FILE).read_text()) == OPTIONS


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        claim(str(tmp_path / "a"), OPTIONS, is_main=True)
    with pytest.raises(ValueError, match=r"is not empty \(a\) and holds no run"):
        claim(str(tmp_path), OPTIONS, is_main=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_whole_checkpoints_is_taken_and_one_of_broken_ones_is_not(checkpoint: Path) -> None:
    out = checkpoint.parent
    copy = Path(shutil.copytree(out, out.with_name("copy")))
    claim(str(out), OPTIONS, is_main=True)
    assert (out / OWN_FILE).is_file()
    spoil(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=r"is not empty \(checkpoint-2\) and holds no run"):
        claim(str(copy), OPTIONS, is_main=True)


def test_a_claim_that_was_killed_is_taken_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / OWN_FILE).with_suffix(".incomplete").write_text("{")
    claim(str(tmp_path / "out"), OPTIONS, is_main=True)


def test_a_run_of_an_earlier_version_may_go_on(tmp_path: Path) -> None:
    claim(str(tmp_path / "out"), OPTIONS, is_main=True)
    claim(str(tmp_path / "out"), {**OPTIONS, "added_later": False}, is_main=True)
