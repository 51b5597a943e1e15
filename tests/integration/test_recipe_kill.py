"""A recipe that is killed with SIGKILL, anywhere, and started again with the same words ends as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file

from hf_gradguard import RunRecord
from recipes import train_classifier, train_clm, train_mlm

KILLS = 20
UPDATES, SAVE_EVERY = 66, 3
SMALL = {
    "clm": "--model_type gpt2 --config_overrides n_layer=2,n_head=2,n_embd=32 --block_size 32",
    "mlm": "--model_type bert --max_seq_length 32 --config_overrides "
    "num_hidden_layers=2,num_attention_heads=2,hidden_size=32,intermediate_size=64",
}
SMALL["classifier"] = SMALL["mlm"]
RECIPES = {"clm": train_clm.main, "mlm": train_mlm.main, "classifier": train_classifier.main}
COMMON = (
    f"--tokenizer_name bytes --max_steps {UPDATES} --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
    f"--save_strategy steps --save_steps {SAVE_EVERY} --eval_strategy steps --eval_steps {2 * SAVE_EVERY} "
    "--load_best_model_at_end false --max_eval_samples 4 --learning_rate 1e-3 --accumulate fixed:windows=2 --clip zclip"
)


def words(recipe: str, folder: Path, text: Path) -> list[str]:
    text = text.with_suffix(".jsonl") if recipe == "classifier" else text
    return ["--output_dir", str(folder), "--train_file", str(text), *SMALL[recipe].split(), *COMMON.split()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "topics.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    rows = [{"text": line, "label": len(line) > 60} for line in "".join(topics.values()).splitlines() if line]
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows[:2000])), encoding="utf-8")
    return path


def start(recipe: str, folder: Path, text: Path) -> multiprocessing.process.BaseProcess:
    def run() -> None:
        log = folder.with_suffix(".log").open("a", buffering=1, encoding="utf-8")
        sys.stdout = sys.stderr = log  # those of the parent belong to pytest
        RECIPES[recipe](words(recipe, folder, text))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def kill(process: multiprocessing.process.BaseProcess, when: Callable[[], bool], delay: float) -> bool:
    """Kills it some seconds after something has come to be; gives whether it was still running."""
    while process.is_alive() and not when():
        time.sleep(0.001)
    process.join(delay)
    was_running = process.is_alive()
    if was_running:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return was_running


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_killed_twenty_times_a_recipe_ends_with_the_weights_of_an_uninterrupted_run(
    recipe: str, tmp_path: Path, text: Path
) -> None:
    whole = start(recipe, tmp_path / "whole", text)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()

    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:  # in one run, or on a fast machine in several
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        kills += kill_again_and_again(recipe, folder, text, moments, KILLS - kills)
        expected, found = load_file(tmp_path / "whole" / "model.safetensors"), load_file(folder / "model.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert RunRecord.load(folder).steps.tolist() == list(range(1, UPDATES + 1))
    logs = "".join(path.read_text() for path in tmp_path.glob("killed-*.log"))
    assert logs.count("Going on from") >= KILLS // 2
    print(f"{logs.count('passed over')} checkpoints were cut off by a kill")


def kill_again_and_again(recipe: str, folder: Path, text: Path, moments: random.Random, most: int) -> int:
    """Kills a run up to so many times, and lets it end; gives how often it was killed before it ended."""
    for number in range(most + 1):
        before = newest(folder) if folder.exists() else 0
        process = start(recipe, folder, text)
        # Half of them within the writing of a checkpoint, which takes some milliseconds; half of them anywhere.
        within = number % 2 == 0
        awaited = before + SAVE_EVERY * (1 if within else moments.choice([0, 1]))
        was_killed = number < most and kill(
            process,
            lambda awaited=awaited: newest(folder) >= awaited and (folder / "gradguard").exists(),
            moments.uniform(0, 0.02) if within else moments.uniform(0, 0.6),
        )
        process.join()
        if not was_killed:
            assert process.exitcode == 0, folder.with_suffix(".log").read_text()[-3000:]
            return number
    raise AssertionError("the last start is not killed")
