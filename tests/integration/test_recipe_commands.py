"""Every command for training in both READMEs runs, shortened to a few updates, and its report opens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from hf_gradguard import RunRecord

ROOT = Path(__file__).parents[2]
README = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md"))
SHORT = (
    "--max_steps 4 --eval_strategy steps --eval_steps 4 --save_strategy steps --save_steps 4 --max_eval_samples 8 "
    "--max_train_samples 200 --gradient_accumulation_steps 2 --per_device_train_batch_size 4"
)


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if "recipes/train_" in line]


def alone() -> list[list[str]]:
    """Those that are for one process and bring their text along, one for each recipe."""
    found = [command for command in commands() if command[0] == "python" and "builtin:" in str(command)]
    return list({command[1]: command for command in found}.values())


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    command = [_a_text(word, folder) if word in ("train.txt", "valid.txt", "test.txt") else word for word in command]
    starts = {
        "python": [sys.executable],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }
    words = [*starts[command[0]], *command[1:], "--output_dir", str(folder), *SHORT.split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _a_text(name: str, folder: Path) -> str:
    """A corpus of one sentence a line, as the command wants one."""
    path = folder.with_name(name)
    path.write_text("\n".join(topics.values())[:60_000], encoding="utf-8")
    return str(path)


def check(folder: Path, processes: int) -> None:
    record = RunRecord.load(folder)
    assert record.steps.tolist() == [1, 2, 3, 4]
    assert record.status == "finished"
    assert (folder / "model.safetensors").exists()
    assert "<html" in (folder / "gradguard" / "report.html").read_text(encoding="utf-8")[:500].lower()
    assert "Verdict" in (folder / "README.md").read_text(encoding="utf-8")
    states = sorted(path.name for path in (folder / "checkpoint-4").glob("rng_state*"))
    assert states == (["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)])


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_readme_has_a_command_for_each_recipe() -> None:
    named = [word for command in commands() for word in command if word.startswith("recipes/train_")]
    assert {Path(word).name for word in named} == {path.name for path in (ROOT / "recipes").glob("train_*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=lambda command: command[command.index("--output_dir") + 1])
def test_a_command_of_the_readme_runs(command: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    out = run(command, tmp_path / "out", environment)
    assert "Report: file://" in out
    check(tmp_path / "out", processes=2 if command[0] == "accelerate" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("command", alone(), ids=lambda command: command[1])
def test_a_command_of_the_readme_runs_on_two_processes(
    command: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    launch = ["accelerate", "launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
    run([*launch, *command[1:]], tmp_path / "out", environment)
    check(tmp_path / "out", processes=2)


@pytest.mark.slow
def test_one_process_is_started_on_the_cpu(tmp_path: Path, environment: dict[str, str]) -> None:
    launch = ["accelerate", "launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    run([*launch, *alone()[0][1:]], tmp_path / "out", environment)
    check(tmp_path / "out", processes=1)
