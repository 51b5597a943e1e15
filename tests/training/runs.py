"""Small runs of the recipes: words of the command line, text, and what lies in the output folder afterwards."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_gradguard.training.trainer import RecipeTrainer
from recipes import train_classifier, train_clm, train_mlm

MAIN: dict[str, Callable[..., dict[str, float]]] = {
    "clm": train_clm.main,
    "mlm": train_mlm.main,
    "classifier": train_classifier.main,
}
GPT2 = "n_layer=2,n_head=2,n_embd=16,n_positions=64"
BERT = "num_hidden_layers=2,num_attention_heads=2,hidden_size=16,intermediate_size=32,max_position_embeddings=64"
SMALL = {
    "clm": f"--model_type gpt2 --config_overrides {GPT2} --tokenizer_name bytes --block_size 32",
    "mlm": f"--model_type bert --config_overrides {BERT} --tokenizer_name wordpiece:vocab_size=300 --max_seq_length 32",
    "classifier": f"--model_type bert --config_overrides {BERT} --tokenizer_name wordpiece:vocab_size=300",
}
COMMON = (
    "--use_cpu --report_to none --per_device_train_batch_size 4 --learning_rate 1e-2 --max_steps 8 "
    "--eval_strategy steps --eval_steps 4 --save_strategy steps --save_steps 4 --max_eval_samples 16 "
    "--record false"  # of which a page is made, that takes longer than all else
)


def write_text(path: Path, characters: int = 40_000) -> Path:
    """English text, in lines."""
    path.write_text("\n".join(topics.values())[:characters], encoding="utf-8")
    return path


def write_reviews(path: Path, count: int = 120, seed: int = 0) -> Path:
    """A table of short texts whose words tell the class, which is text too."""
    generator = random.Random(seed)
    words = {"good": ["fine", "nice", "fair", "great"], "bad": ["poor", "sad", "dull", "awful"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(count):
            label = ("good", "bad")[index % 2]
            length = generator.randrange(3, 12)
            writer.writerow([" ".join(generator.choice([*words[label], "a", "film"]) for _ in range(length)), label])
    return path


def words(recipe: str, folder: Path, *more: str, **replaced: str | None) -> list[str]:
    """The command line of a small run.

    Args:
        recipe: `clm`, `mlm` or `classifier`.
        folder: with the text, in which the output lies in `out`.
        more: further words.
        replaced: options in place of the small run's own, None to leave one out.
    """
    source = write_reviews(folder / "reviews.csv") if recipe == "classifier" else write_text(folder / "text.txt")
    given = f"--output_dir {folder / 'out'} --train_file {source} {SMALL[recipe]} {COMMON}".split()
    options: dict[str, list[str]] = {}
    for word in given:
        if word.startswith("--"):
            options[word] = []
        else:
            options[next(reversed(options))].append(word)
    for name, value in replaced.items():
        options[f"--{name}"] = [] if value is None else value.split()
        if value is None:
            del options[f"--{name}"]
    return [word for name, values in options.items() for word in (name, *values)] + list(more)


def run(recipe: str, folder: Path, *more: str, **replaced: str | None) -> dict[str, float]:
    """Runs the recipe in this process; arguments as for `words`, gives its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    return MAIN[recipe](words(recipe, folder, *more, **replaced))


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights that lie in a folder."""
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict[str, Any]:
    """What Trainer says of a run or a checkpoint."""
    return dict(json.loads((folder / "trainer_state.json").read_text()))


def checkpoints(folder: Path) -> list[int]:
    """The updates of which there are checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


class Interrupted(BaseException):  # which no handler of errors takes for one
    """What a run dies of in a test."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Has each run die after so many micro-batches, until the patch is undone."""
    step, count = RecipeTrainer.training_step, [0]

    def dying(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        if count[0] > after:
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", dying)


def assert_same_weights(one: Path, other: Path) -> None:
    """Every tensor of two folders is the same to the last bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
