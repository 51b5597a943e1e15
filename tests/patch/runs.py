"""What tests of patches do with a whole model: train it, and let it generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tests.patch.models import Case
from tests.patch.test_taps import close
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


def check_generation(model: Any, case: Case) -> None:
    """Generation with a key-value cache gives the tokens and logits of generation without."""
    runs = [
        model.generate(
            case.inputs()["input_ids"],
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=1e-5)
