"""What the guard costs: time per step of a guarded training ÷ an unguarded one, measured step by step.

Two trainings of the same model, one with `GradGuardCallback` and one without, take turns on the same machine: a step of
one, a step of the other, each a real `Trainer` with everything it does between two steps. A machine whose speed drifts
slows both. Reported is the median of the ratios of neighbouring steps, with a 95 % interval by resampling. On a CPU a
step is timed by the processor time of this process, so that other programs do not count; with OMP_NUM_THREADS=1 that is
the time that it takes.

    python recipes/bench_overhead.py                         # watching GPT-2 small and BERT of 100 layers × 64 wide
    python recipes/bench_overhead.py --models bert --steps 200
    python recipes/bench_overhead.py --policies all          # each clipping rule and accumulation policy in turn
    python recipes/bench_overhead.py --policies control      # two unguarded trainings: how well it measures

A policy that holds windows back saves the optimizer's steps in between, so that its ratio can be below 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
import time
from typing import Any

# The trainings have a team of threads each; those of the one that waits must not keep the processors busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_gradguard import GradGuardCallback

WARM_UP = 3
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def gpt2() -> tuple[nn.Module, int, int, int]:
    """GPT-2 small, 124 million parameters; with its batch, length and vocabulary."""
    config = GPT2Config()
    return GPT2LMHeadModel(config), 1, 128, config.vocab_size


def bert() -> tuple[nn.Module, int, int, int]:
    """A causal BERT of 100 layers, 64 wide, 1610 tensors; with its batch, length and vocabulary."""
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=100,
        num_attention_heads=4,
        intermediate_size=256,
        is_decoder=True,
    )
    return BertLMHeadModel(config), 8, 64, config.vocab_size


MODELS = {"gpt2": gpt2, "bert": bert}
POLICIES: dict[str, dict[str, str] | None] = {
    "control": None,
    "watch": {},
    **{name: {"clip": name} for name in ("global", "layer", "agc", "autoclip", "zclip", "adagc")},
    "fixed": {"accumulate": "fixed:windows=4"},
    "norm_threshold": {"accumulate": "norm_threshold:threshold=1e9,max_windows=4"},
    "noise_scale": {"accumulate": "noise_scale:max_windows=4"},
    "norm_test": {"accumulate": "norm_test:max_windows=4"},
    "ramp": {"accumulate": "ramp:start=4,end=4"},
}
"""Options of the guard by a short name; the accumulation policies make an update of at most four windows. The control
is two unguarded trainings: what its ratio is away from 1 is the machine's doing."""


class Turns(TrainerCallback):
    """Lets one training make a step while the other waits, and times the steps."""

    def __init__(self, players: int) -> None:
        self._turn = 0
        self._players = players
        self._changed = threading.Condition()
        self.seconds: list[list[float]] = [[] for _ in range(players)]
        self._began = [0.0] * players

    def of(self, player: int) -> TrainerCallback:
        """The callback of one of the trainings."""
        turns = self

        class Turn(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                turns._finish(player)
                turns._wait(player)

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                turns._finish(player)

        return Turn()

    def _finish(self, player: int) -> None:
        if self._began[player]:
            self.seconds[player].append(CLOCK() - self._began[player])
            with self._changed:
                self._turn = (self._turn + 1) % self._players
                self._changed.notify_all()

    def _wait(self, player: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == player)
        self._began[player] = CLOCK()


class Quiet(GradGuardCallback):
    """The callback as it is, but for the summary that it prints at the end."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.end("finished")


def measure(name: str, max_grad_norm: float, steps: int, options: dict[str, str] | None) -> np.ndarray:
    """Seconds of each step `[2, steps]`: unguarded, guarded with these options (None: unguarded, too)."""
    turns = Turns(2)
    threads = []
    for player, guarded in enumerate((False, True)):
        torch.manual_seed(0)
        model, batch, length, vocabulary = MODELS[name]()
        tokens = torch.randint(vocabulary, (batch * 8, length))
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps + WARM_UP,
            per_device_train_batch_size=batch,
            max_grad_norm=max_grad_norm,
            learning_rate=1e-5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        callbacks = [turns.of(player), *([Quiet(**options)] if guarded and options is not None else [])]
        data = [{"input_ids": ids, "labels": ids} for ids in tokens]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        threads.append(threading.Thread(target=trainer.train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.array([seconds[WARM_UP:] for seconds in turns.seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=60, help="steps to measure of each training")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=["all", *POLICIES],
        default=["watch"],
        help="what the guard does (default: watch)",
    )
    args = parser.parse_args()
    logging.getLogger("hf_gradguard").setLevel(logging.ERROR)
    chosen = list(POLICIES) if "all" in args.policies else args.policies
    print(
        f"{'model':6}  {'policy':14}  {'clipping':8}  {'unguarded':>10}  {'guarded':>10}  {'ratio':>6}  95 % interval"
    )
    for name in args.models:
        for policy in chosen:
            limits = {"never": 1e9, "always": 1e-3} if policy == "watch" else {"never": 1e9}
            for clipping, limit in limits.items():
                report(f"{name:6}  {policy:14}  {clipping:8}", measure(name, limit, args.steps, POLICIES[policy]))


def report(label: str, seconds: np.ndarray) -> None:
    """Prints one line: the median of the ratios of neighbouring steps `[2, steps]`, with its interval."""
    ratios = seconds[1] / seconds[0]
    samples = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(samples, (0.025, 0.975))
    plain, guarded = np.median(seconds, axis=1) * 1e3
    print(f"{label}  {plain:7.1f} ms  {guarded:7.1f} ms  {np.median(ratios):6.3f}  {low:.3f} … {high:.3f}", flush=True)


if __name__ == "__main__":
    main()
