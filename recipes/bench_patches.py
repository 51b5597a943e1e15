"""What patches cost: time and peak memory of forward and backward, patched ÷ unpatched, at the width of GPT-2 small and
BERT base.

A patched and an unpatched model of the same weights take turns on the same batch, step by step, so that a machine whose
speed drifts slows both; reported is the median of the ratios of neighbouring steps, with a 95 % interval by resampling,
beside the ratio of the floating-point operations. On a CPU a step is timed by the processor time of this process, so
that other programs do not count; with OMP_NUM_THREADS=1 that is the time that it takes. Peak memory is that of a
process which does nothing else.

    python recipes/bench_patches.py                                  # all of it: twenty minutes on 2 cores
    python recipes/bench_patches.py --models gpt2 --patches residual=layerscale --steps 30
    python recipes/bench_patches.py --width 64 --layers 100          # many thin layers: what the calls alone cost
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Threads that wait must not count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# For the processes whose memory is measured: glibc gives large buffers back at once, as it does until it learns better.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_gradguard import fold_patches, patch_model

WARM_UP = 2
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATCHES = {
    "gpt2": (
        "residual=branch_scale",
        "residual=rezero:init=0.5",
        "residual=skipinit:init=0.5",
        "residual=layerscale:init=0.5",
        "residual=output_gate",
        "residual=gru_gate",
        "norm=sandwich",
    ),
    "bert": ("residual=deepnorm;init=deepnorm", "residual=layerscale:init=0.5", "norm=pre", "residual=highway_gate"),
}
"""What is measured with each model. Of the multipliers there is also the folded model."""
FOLDING = ("branch_scale", "rezero", "skipinit", "layerscale", "deepnorm")


@dataclass(frozen=True)
class Setting:
    """One model and what goes through it.

    Args:
        name: `gpt2` or `bert`.
        width: of the residual stream.
        layers: depth.
        size: rows of the batch.
        length: tokens of a row.
        patch: what the model is patched with; None for nothing.
        is_folded: whether the patch is merged into the weights again.
    """

    name: str
    width: int
    layers: int
    size: int
    length: int
    patch: str | None = None
    is_folded: bool = False

    def make(self) -> PreTrainedModel:
        """The model, with random weights and no dropout, so that patched and unpatched ones do the same work."""
        torch.manual_seed(0)
        heads = max(1, self.width // 64)
        if self.name == "gpt2":
            model: PreTrainedModel = GPT2LMHeadModel(
                GPT2Config(
                    n_embd=self.width,
                    n_layer=self.layers,
                    n_head=heads,
                    n_positions=self.length,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                )
            )
        else:
            model = BertForMaskedLM(
                BertConfig(
                    hidden_size=self.width,
                    num_hidden_layers=self.layers,
                    num_attention_heads=heads,
                    intermediate_size=4 * self.width,
                    max_position_embeddings=self.length,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )
        if self.patch is not None:
            patch_model(model, self.patch)
        return (fold_patches(model) if self.is_folded else model).to(DEVICE)

    def batch(self) -> dict[str, Tensor]:
        """Random tokens; the cost does not depend on them."""
        vocabulary = 50257 if self.name == "gpt2" else 30522
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(vocabulary, (self.size, self.length), generator=generator).to(DEVICE)
        return {"input_ids": ids, "labels": ids}


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Forward and backward."""
    model(**batch).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def ratios(one: PreTrainedModel, other: PreTrainedModel, batch: dict[str, Tensor], steps: int) -> np.ndarray:
    """Time of a step of `other` ÷ time of the neighbouring step of `one`, `[steps]`."""
    seconds = np.empty((2, steps + WARM_UP))
    for index in range(steps + WARM_UP):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        for which in order:
            began = CLOCK()
            step((one, other)[which], batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[which, index] = CLOCK() - began
    return seconds[1, WARM_UP:] / seconds[0, WARM_UP:]


def operations(model: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of matrix products in a step."""
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    return counter.get_total_flops()


def peak(setting: Setting) -> float:
    """Peak memory of two steps in a process of its own, in bytes, without what Python and its libraries take."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (setting,)))


def _peak(setting: Setting) -> float:
    model, batch = setting.make(), setting.batch()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(model, batch)
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return _resident() - _IMPORTED


def _share(one: float, other: float) -> float:
    """Ratio of two peaks; NaN for models so small that importing the libraries took more."""
    return one / other if other > 0 else math.nan


def _resident() -> float:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the other way counts what the parent had when it began this process
        return 1024.0 * next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


_IMPORTED = _resident()
"""What the process took when everything was imported."""


def line(label: str, found: np.ndarray, predicted: float, memory: float) -> None:
    """Prints one row of the table."""
    samples = np.median(np.random.default_rng(0).choice(found, (2000, len(found))), axis=1)
    low, high = np.quantile(samples, (0.025, 0.975))
    print(f"| {label} | {np.median(found):.3f} ({low:.3f} – {high:.3f}) | {predicted:.3f} | {memory:.3f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs it; `argv` are the words after the script's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(PATCHES), default=sorted(PATCHES, reverse=True))
    parser.add_argument("--patches", nargs="+", help="patches to measure (default: those in this file)")
    parser.add_argument("--steps", type=int, default=24, help="pairs of steps to measure (default: 24)")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args(argv)
    for name in args.models:
        plain = Setting(name, args.width, args.layers, args.batch, args.length)
        print(f"\n{name}, {args.width} wide, {args.layers} layers, {args.batch} × {args.length} tokens, {DEVICE}\n")
        print("| | time, patched ÷ unpatched (95 %) | operations | peak memory |\n|---|---|---|---|")
        batch, base, twin, base_peak = plain.batch(), plain.make(), plain.make(), peak(plain)
        base_operations = operations(base, batch)
        line("(unpatched beside itself)", ratios(base, twin, batch, args.steps), 1.0, _share(peak(plain), base_peak))
        del twin
        for patch in args.patches or PATCHES[name]:
            kinds = (False, True) if any(rule in patch for rule in FOLDING) else (False,)
            for is_folded in kinds:
                setting = dataclasses.replace(plain, patch=patch, is_folded=is_folded)
                model = setting.make()
                predicted = operations(model, batch) / base_operations
                label = f"`{patch}`" + (", folded" if is_folded else "")
                line(label, ratios(base, model, batch, args.steps), predicted, _share(peak(setting), base_peak))


if __name__ == "__main__":
    main()
