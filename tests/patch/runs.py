"""What tests of patches do with a whole model: train it, and let it generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from tests.patch.models import Case
from tests.training import arguments


def examples(case: Case, count: int) -> list[dict[str, Any]]:
    """Random tokens with themselves as labels."""
    found = []
    for seed in range(count):
        example = {key: value[0] for key, value in case.inputs(seed).items()}
        found.append({**example, "labels": example.get("decoder_input_ids", example["input_ids"])})
    return found


def trained(model: Any, case: Case, output_dir: Path, *callbacks: TrainerCallback, **options: Any) -> list[float]:
    """Trains a model under a Trainer on four random examples at a time; the losses."""
    args = arguments(output_dir, **options)
    trainer = Trainer(model, args, train_dataset=examples(case, 4 * args.max_steps), callbacks=list(callbacks))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
