"""Which patches let 100 layers train: every preset beside the unpatched model, at the best of several learning rates.

Each run is a real `Trainer` with `GradGuardCallback` on real text, byte by byte. For every arm each learning rate is
tried with the first seed; the best goes on with the others. What is done is kept in `results.jsonl`, so that a study
that was interrupted goes on where it was.

    python recipes/study_depth.py                            # BERT and GPT-2, 100 layers beside 12: hours on 2 cores
    python recipes/study_depth.py --models bert --arms vanilla rezero --seeds 1
    python recipes/study_depth.py --models bert --layers 1000 --width 32 --steps 100 --arms rezero --seeds 1
    python recipes/study_depth.py --table                    # the table of what is done, in Markdown

Two runs of it in two terminals share the work: a run that somebody has begun is left to him.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradguard import GradGuardCallback, RunRecord, param_groups, patch_model
from hf_gradguard.cli.demo import BATCH, BLOCK, blocks, real_text
from hf_gradguard.judge import depth_profile

WARM_UP = 20
HELD_OUT = 128
"""Blocks of the text that no run is trained on; their loss is what arms are compared by."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SHALLOW = "shallow"
VANILLA = "vanilla"
ARMS = {
    "bert": (
        "rezero",
        "pre_ln_scaled",
        "layerscale",
        "gtrxl",
        "deepnorm",
        "completep",
        "sandwich",
        "t_fixup",
        "gtrxl:bias=2",
    ),
    "gpt2": (
        "pre_ln_scaled",
        "completep:base_depth=12",
        "completep",
        "rezero",
        "layerscale",
        "sandwich",
        "deepnorm",
    ),
}
"""What is tried with each model, beside the unpatched one of both depths."""
NEEDS_GROUPS = ("completep",)
"""Patches that scale learning rates."""


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        model: `bert` or `gpt2`.
        arm: `vanilla`, `shallow` (unpatched, of few layers), or a patch.
        layers: depth.
        width: of the residual stream.
        steps: updates.
        std: standard deviation of the model's own initialisation.
        rate: peak learning rate.
        seed: of weights and order of the data.
    """

    model: str
    arm: str
    layers: int
    width: int
    steps: int
    std: float
    rate: float
    seed: int

    @property
    def warm_up(self) -> int:
        """Updates in which the rate rises, and ratios are not looked at."""
        return min(WARM_UP, self.steps // 5)

    @property
    def key(self) -> str:
        """What tells runs apart."""
        return " ".join(str(value) for value in dataclasses.astuple(self))


def make_model(run: Run) -> PreTrainedModel:
    """The model of a run, patched."""
    heads = run.width // 16
    if run.model == "bert":
        config: Any = BertConfig(
            vocab_size=256,
            hidden_size=run.width,
            num_hidden_layers=run.layers,
            num_attention_heads=heads,
            intermediate_size=4 * run.width,
            max_position_embeddings=BLOCK,
            is_decoder=True,
            initializer_range=run.std,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: PreTrainedModel = BertLMHeadModel(config)
    else:
        config = GPT2Config(
            vocab_size=256,
            n_embd=run.width,
            n_layer=run.layers,
            n_head=heads,
            n_positions=BLOCK,
            initializer_range=run.std,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it would fall back to, with a warning
    return model if run.arm in (SHALLOW, VANILLA) else patch_model(model, run.arm)


def train(run: Run, data: Sequence[dict[str, Tensor]], folder: Path) -> dict[str, Any]:
    """Trains one model; gives losses, first-to-last ratios, similarity of tokens and seconds of a step."""
    set_seed(run.seed)
    model = make_model(run)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=run.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=run.warm_up,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=run.seed,
    )
    callback = GradGuardCallback()
    optimizer = None
    if run.arm.partition(":")[0] in NEEDS_GROUPS:
        optimizer = torch.optim.AdamW(param_groups(model, lr=run.rate), lr=run.rate, fused=True)
    held_out, own = data[-HELD_OUT:], data[:-HELD_OUT]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=own,
        callbacks=[callback],
        optimizers=(optimizer, None),  # type: ignore[arg-type]
    )
    with _quiet():
        trainer.train()
    assert callback.guard is not None
    record = RunRecord.load(folder)
    norms = record.layer_norms
    norms = norms[np.isfinite(norms).all(axis=1)]  # without the updates that were skipped
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = norms[run.warm_up :, 0] / norms[run.warm_up :, -1]
    loss, similarity = evaluate(model, held_out)
    return {
        "held_out": loss,
        "train": float(record.losses[-10:].mean()),
        "ratio": depth_profile(norms[-10:]).first_to_last,
        "ratio_low": float(np.quantile(ratios, 0.05)),
        "ratio_high": float(np.quantile(ratios, 0.95)),
        "similarity": similarity,
        "verdict": callback.guard.verdict.kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps verdicts and the Trainer's own words off the terminal: a line for each run is enough."""
    logger = logging.getLogger("hf_gradguard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean loss on the held-out blocks, and the mean cosine similarity of the tokens of a block in the last hidden
    state: 1 where all have become one vector."""
    model.eval()
    losses, similarities = [], []
    for start in range(0, len(held_out), 2 * BATCH):
        ids = torch.stack([block["input_ids"] for block in held_out[start : start + 2 * BATCH]]).to(model.device)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
        hidden = F.normalize(model.base_model(input_ids=ids).last_hidden_state.double(), dim=-1)
        pairs = hidden @ hidden.transpose(1, 2)
        count = pairs.shape[-1]
        similarities.append((pairs.sum((1, 2)) - count).mean().item() / (count * (count - 1)))
    return float(np.mean(losses)), float(np.mean(similarities))


class Results:
    """What is done, one line of JSON for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> dict[str, dict[str, Any]]:
        """Every result by the key of its run."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {row["key"]: row for row in map(json.loads, filter(str.strip, lines))}

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Appends one."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": run.key, **dataclasses.asdict(run), **result}) + "\n")

    def claim(self, run: Run) -> bool:
        """Takes a run for this process; False where another has it."""
        path = self.folder / "begun" / run.key.replace("/", "_")
        path.parent.mkdir(exist_ok=True)
        if path.exists() and not _is_alive(int(path.read_text() or 0)):
            path.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return process != 0


def plan(args: argparse.Namespace) -> list[list[Run]]:
    """For each arm the runs with the first seed, one for each rate."""
    plans = []
    for model in args.models:
        std = args.std or 0.02 * (768 / args.width) ** 0.5
        arms = args.arms or (SHALLOW, VANILLA, *ARMS[model])
        for arm in arms:
            layers = args.shallow if arm == SHALLOW else args.layers
            runs = [Run(model, arm, layers, args.width, args.steps, std, rate, 0) for rate in args.rates]
            plans.append(runs)
    return plans


def todo(plans: list[list[Run]], seeds: int, results: Results) -> Iterator[Run]:
    """The runs that are left, each asked for when its turn has come: which rate is the best is known only then."""
    for runs in plans:
        yield from (run for run in runs if run.key not in results.all())
    for runs in plans:
        done = results.all()
        found = [run for run in runs if run.key in done]
        if len(found) == len(runs):  # else somebody else is at it
            best = min(found, key=lambda run: loss_of(done[run.key]))
            for seed in range(1, seeds):
                run = dataclasses.replace(best, seed=seed)
                if run.key not in results.all():
                    yield run


def loss_of(row: dict[str, Any]) -> float:
    """The held-out loss; infinity for a run that ended in NaN."""
    loss = float(row["held_out"])
    return loss if math.isfinite(loss) else math.inf


def table(results: Results) -> str:
    """Markdown: one line for each arm, at its best rate, with the spread of the seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.all().values():
        groups.setdefault((row["model"], row["width"], row["steps"], row["std"]), []).append(row)
    return "\n\n".join(_table(setting, rows) for setting, rows in groups.items())


def _table(setting: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    model, width, steps, std = setting
    lines = [
        f"{model}, {width} wide, {steps} steps, initialised with std {std:.3f}:",
        "",
        "| arm | layers | best rate | held-out loss (seeds) | ÷ shallow | first ÷ last (5–95 %) | token similarity | "
        "ms a step | other rates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    arms: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault((row["arm"], row["layers"]), []).append(row)
    shallow = next((_best(own)[1] for (arm, _), own in arms.items() if arm == SHALLOW), [])
    reference = np.mean([loss_of(row) for row in shallow]) if shallow else math.nan
    order = sorted(arms.items(), key=lambda item: (item[0][0] != SHALLOW, item[0][0] != VANILLA, _mean(item[1])))
    for (arm, layers), own in order:
        rate, best = _best(own)
        losses = [loss_of(row) for row in best]
        others = ", ".join(
            f"{row['rate']:g}: {loss_of(row):.2f}"
            for row in sorted(own, key=lambda row: row["rate"])
            if row["rate"] != rate and row["seed"] == 0
        )
        spread = f" ± {np.std(losses, ddof=1):.2f}" if len(losses) > 1 else ""
        name = VANILLA if arm == SHALLOW else arm
        lines.append(
            f"| {name} | {layers} | {rate:g} | {np.mean(losses):.3f}{spread} ({len(losses)}) | "
            f"{np.mean(losses) / reference:.3f} | "
            f"{min(row['ratio_low'] for row in best):.2g} – {max(row['ratio_high'] for row in best):.2g} | "
            f"{np.mean([row['similarity'] for row in best]):.2f} | "
            f"{np.median([row['ms'] for row in own]):.0f} | {others} |"
        )
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """The rate that is best with the first seed, and all seeds' rows with it."""
    first = min((row for row in rows if row["seed"] == 0), key=loss_of)
    return first["rate"], [row for row in rows if row["rate"] == first["rate"]]


def _mean(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([loss_of(row) for row in _best(rows)[1]]))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs it; `argv` are the words after the script's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(ARMS), default=sorted(ARMS))
    parser.add_argument("--arms", nargs="+", help="vanilla, shallow, or patches (default: those in this file)")
    parser.add_argument("--layers", type=int, default=100, help="depth of all arms but shallow (default: 100)")
    parser.add_argument("--shallow", type=int, default=12, help="depth of the shallow model (default: 12)")
    parser.add_argument("--width", type=int, default=64, help="of the residual stream (default: 64)")
    parser.add_argument("--steps", type=int, default=150, help="updates of each run (default: 150)")
    parser.add_argument("--std", type=float, help="of the model's own initialisation (default: 0.02 · √(768 / width))")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="peak learning rates to try")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for the best rate (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("study-depth"), help="folder for results and records")
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    args = parser.parse_args(argv)
    results = Results(args.output)
    if args.table:
        print(table(results))
        return
    text, source = real_text()
    data = blocks(text)
    plans = plan(args)
    total = sum(map(len, plans)) + len(plans) * (args.seeds - 1)
    print(f"{total} runs on {source}; what is done is kept in {results.path}", flush=True)
    for run in todo(plans, args.seeds, results):
        if not results.claim(run):
            continue
        started = time.monotonic()
        result = train(run, data, args.output / "runs" / run.key.replace(" ", "_").replace("/", "_"))
        seconds = time.monotonic() - started
        results.add(run, {**result, "ms": 1e3 * seconds / run.steps})
        print(
            f"{len(results.all()):4d}/{total}  {run.model} {run.arm} {run.layers} layers, rate {run.rate:g}, seed "
            f"{run.seed}: loss {result['held_out']:.3f}, first ÷ last {result['ratio']:.2g}, {seconds:.0f} s",
            flush=True,
        )
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
