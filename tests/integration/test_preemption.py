"""At SIGTERM a recipe saves after the update it is at and ends; started again it ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file

from hf_gradguard.training.preemption import EXIT_CODE, Preemption
from recipes import train_clm

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "accelerate" / "cpu_2.yaml"
OPTIONS = (
    "--model_type gpt2 --config_overrides n_layer=2,n_head=2,n_embd=32 --block_size 32 --tokenizer_name bytes "
    "--per_device_train_batch_size 2 --max_steps 40 --learning_rate 1e-3 --max_eval_samples 8 --logging_steps 1 "
    "--save_strategy steps --save_steps 40 --eval_strategy steps --eval_steps 40 --save_total_limit 1"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "topics.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


def words(folder: Path, text: Path) -> list[str]:
    return ["--output_dir", str(folder), "--train_file", str(text), *OPTIONS.split()]


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_saves_and_ends_and_goes_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_clm.main(words(tmp_path / "whole", text))
    before = signal.getsignal(signal.SIGTERM)

    original = Preemption.on_step_end

    def send(self: Preemption, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 7:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Preemption, "on_step_end", send)
    with pytest.raises(SystemExit) as ended:
        train_clm.main(words(tmp_path / "asked", text))
    assert ended.value.code == EXIT_CODE
    assert "saved after update 7" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "asked").glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (tmp_path / "asked" / "model.safetensors").exists()

    monkeypatch.undo()
    train_clm.main(words(tmp_path / "asked", text))
    assert same_weights(tmp_path / "whole", tmp_path / "asked")


def test_the_checkpoint_is_kept_where_an_earlier_one_was_the_best(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = words(tmp_path / "asked", text)
    for name in ("--save_steps", "--eval_steps"):
        options[options.index(name) + 1] = "3"
    options += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    original = Preemption.on_step_end

    def send(self: Preemption, args: object, state: object, control: object, **kwargs: object) -> None:
        self.is_asked = state.global_step == 7  # type: ignore[attr-defined]
        original(self, args, state, control, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Preemption, "on_step_end", send)
    with pytest.raises(SystemExit):
        train_clm.main(options)
    assert "checkpoint-7" in {path.name for path in (tmp_path / "asked").glob("checkpoint-*")}


@pytest.mark.slow
def test_two_processes_end_at_the_same_update_although_one_alone_is_asked(tmp_path: Path, text: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command = [*launch, str(ROOT / "recipes" / "train_clm.py")]
    options = words(tmp_path / "asked", text)
    options[options.index("--max_steps") + 1] = "100000"
    options[options.index("--eval_steps") + 1] = options[options.index("--save_steps") + 1] = "100000"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
        try:
            deadline = time.monotonic() + 300
            while "'loss'" not in log.read_text():
                assert run.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            (worker,) = [pid for pid in children(run.pid) if environment_of(pid).get("RANK") == "1"]
            os.kill(worker, signal.SIGTERM)
            run.wait(timeout=120)
        finally:
            run.kill()
    text_of_log = log.read_text()
    assert text_of_log.count("SIGTERM: saved after update") == 1, text_of_log[-3000:]
    step = int(text_of_log.split("saved after update ")[1].split(".")[0])
    checkpoint = tmp_path / "asked" / f"checkpoint-{step}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def environment_of(pid: int) -> dict[str, str]:
    import psutil

    return psutil.Process(pid).environ()
