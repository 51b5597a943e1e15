"""The model card of a run: what was trained on what, what came of it, and what the gradients did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

import hf_gradguard
from hf_gradguard.training.arguments import DataArguments, ModelArguments

if TYPE_CHECKING:
    from hf_gradguard.training.trainer import RecipeTrainer


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Args:
        model: its options.
        data: those of its text.
        task: as the hub names it, such as `text-generation`.
        auto: the name of the Auto class that loads it.
    """

    model: ModelArguments
    data: DataArguments
    task: str
    auto: str


def write(trainer: RecipeTrainer, origin: Origin, metrics: Mapping[str, float]) -> str:
    """The card in Markdown, with its head for the hub.

    Args:
        trainer: after training.
        origin: where model and text come from.
        metrics: values by `<split>_<name>`.
    """
    name = str(trainer.args.hub_model_id or trainer.args.output_dir).rstrip("/").split("/")[-1]
    return "\n".join(
        [
            f"---\n{_head(name, origin, metrics)}\n---\n",
            f"# {name}\n",
            f"{_sentence(trainer, origin)}\n",
            *_table("Results", {key: f"{value:.4g}" for key, value in metrics.items() if _is_told(key)}),
            *_gradients(trainer),
            *_table("Training", _options(trainer)),
            "## Use\n",
            _use(str(trainer.args.hub_model_id or name), origin),
        ]
    )


def _head(name: str, origin: Origin, metrics: Mapping[str, float]) -> str:
    base, source = origin.model.model_name_or_path, origin.data.dataset_name
    is_on_hub = [text is not None and not text.startswith("builtin:") and not _is_path(text) for text in (base, source)]
    split = "test" if any(key.startswith("test_") for key in metrics) else "eval"
    results = [
        EvalResult(
            task_type=origin.task,
            dataset_type=origin.data.source,
            dataset_name=origin.data.source,
            dataset_split="test" if split == "test" else "validation",
            metric_type=key.removeprefix(f"{split}_"),
            metric_value=round(value, 5),
        )
        for key, value in metrics.items()
        if key.startswith(f"{split}_") and _is_told(key)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=origin.task,
        tags=["gradguard", "generated_from_trainer"],
        base_model=base if is_on_hub[0] else None,
        datasets=source if is_on_hub[1] else None,
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _sentence(trainer: RecipeTrainer, origin: Origin) -> str:
    model: Any = trainer.model
    size = sum(parameter.numel() for parameter in model.parameters())
    base = "" if origin.model.model_name_or_path is None else f" from `{origin.model.model_name_or_path}`"
    kind = "new weights" if origin.model.from_scratch or not base else "fine-tuned"
    patch = "" if origin.model.patch is None else f", patched with `{origin.model.patch}`"
    return f"A `{type(model).__name__}` of {size:,} parameters{base} ({kind}{patch}), trained on {origin.data.source}."


def _gradients(trainer: RecipeTrainer) -> list[str]:
    guard = trainer.guard
    if guard is None:
        return []
    counts = {name: getattr(guard, name) for name in ("updates", "skipped", "clipped", "deferred")}
    return [
        "## Gradients\n",
        *(f"{line}\n" for line in str(guard.verdict).splitlines()),
        ", ".join(f"{value:,} {name}" for name, value in counts.items() if value or name == "updates") + ".\n",
    ]


def _options(trainer: RecipeTrainer) -> dict[str, str]:
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = {
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, "
        f"{args.warmup_steps:g} warm-up",
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "rows an update": f"{batch} ({args.train_batch_size} × {args.gradient_accumulation_steps} micro-batches × "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''})",
        "epochs, updates": f"{trainer.state.epoch or 0:.2f}, {trainer.state.global_step:,}",
        "seed": str(args.seed),
        "guard": f"nonfinite={trainer.guard_config.nonfinite}, clip={trainer.guard_config.clip}, "
        f"accumulate={trainer.guard_config.accumulate}",
    }
    libraries = (hf_gradguard, transformers, torch, accelerate, datasets, tokenizers)
    rows["versions"] = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    return rows


def _use(name: str, origin: Origin) -> str:
    guard = "import hf_gradguard  # the model is patched\n" if origin.model.patch else ""
    return (
        f"```python\n{guard}from transformers import {origin.auto}, AutoTokenizer\n\n"
        f'model = {origin.auto}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
    )


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _is_told(key: str) -> bool:
    return not key.endswith(("_runtime", "_per_second", "_samples", "epoch"))
