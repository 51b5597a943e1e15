"""What can be known to be wrong before training starts. Each check is one function, listed in `CHECKS`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Trainer

Check = Callable[[Trainer], str | None]


def refuse(trainer: Trainer) -> None:
    """Raises for what can't be trained at all.

    Raises:
        ValueError: no parameter is trainable, or the training dataset is empty.
    """
    if trainer.model is not None and not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ValueError(
            f"{type(trainer.model).__name__} has no trainable parameter: every requires_grad is False. "
            "Unfreeze some before trainer.train()"
        )
    try:
        size = len(trainer.train_dataset)  # type: ignore[arg-type]
    except TypeError:
        return
    if size == 0:
        raise ValueError("train_dataset is empty (length 0): look at what your filter, split or data file left of it")


def warnings_before_training(trainer: Trainer) -> list[str]:
    """What is going to be wrong with this run, a sentence with its remedy each."""
    return [message for check in CHECKS if (message := check(trainer)) is not None]


def no_gradient_to_see(trainer: Trainer) -> str | None:
    """Optimizers that update inside the backward pass leave no `.grad` behind."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in name or "layerwise" in name:
        return (
            f"optim={name!r} updates each weight inside the backward pass and never leaves a gradient in .grad: norms, "
            "verdicts and skipping are not available, loss and learning rate are recorded. For them use an optimizer "
            "that steps after the backward pass"
        )
    return None


def data_parallel(trainer: Trainer) -> str | None:
    """Several GPUs in one process: Trainer wraps the model in DataParallel."""
    if trainer.args.n_gpu > 1:
        return (
            f"{trainer.args.n_gpu} GPUs in one process: Trainer wraps the model in DataParallel, which is slow. "
            "Start with `accelerate launch` or `torchrun` (or show one GPU with CUDA_VISIBLE_DEVICES=0)"
        )
    return None


def loss_scaling(trainer: Trainer) -> str | None:
    """Whether the loss is divided by the number of target tokens of the whole window, as the Trainer believes of any
    model that takes keyword arguments; where it is not, accumulation adds up gradients that nobody divides.

    Found by trying: the loss of two examples is computed as if the window held twice as many tokens, and must halve.
    """
    times = trainer.args.gradient_accumulation_steps
    if trainer.args.average_tokens_across_devices:
        times *= trainer.args.world_size
    if times == 1 or not trainer.model_accepts_loss_kwargs or _normalises_by_itself(trainer):
        return None
    batch = _two_examples(trainer)
    if batch is None or "labels" not in batch:
        return None
    losses = _losses_for(trainer, batch, (64, 128))
    if losses is None or not np.all(np.isfinite(losses)) or abs(losses[1]) < 0.75 * abs(losses[0]):
        return None
    model = type(trainer.model).__name__
    return (
        f"{model} ignores num_items_in_batch, yet Trainer takes its loss for normalised by it: with "
        f"gradient_accumulation_steps={trainer.args.gradient_accumulation_steps} on {trainer.args.world_size} "
        f"process(es) every gradient will be {times} times too large. Set model.accepts_loss_kwargs = False before "
        "you make the Trainer"
    )


CHECKS: list[Check] = [no_gradient_to_see, data_parallel]
"""Run before every training; `loss_scaling` only where it is asked for."""


def _normalises_by_itself(trainer: Trainer) -> bool:
    has_own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    return has_own_loss or trainer.compute_loss_func is not None or trainer.label_smoother is not None


def _two_examples(trainer: Trainer) -> dict[str, Any] | None:
    """Two collated training examples, taken without moving any iterator or random state of the training; None where
    that is not possible (a one-way stream)."""
    loader: Any = trainer.callback_handler.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    try:
        with _random_state_kept():
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
                examples = [dataset[index % len(dataset)] for index in range(2)]
            elif hasattr(dataset, "take"):  # a `datasets` stream, which starts afresh at each iteration
                examples = list(dataset.take(2))
            else:
                return None
            batch = loader.collate_fn(examples)
    except Exception:  # what the user's dataset or collator raises will be raised again, in its place, by training
        return None
    device = trainer.args.device
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


@torch.no_grad()
def _losses_for(trainer: Trainer, batch: dict[str, Any], counts: tuple[int, ...]) -> list[float] | None:
    model = trainer.model
    assert model is not None
    was_training = model.training
    model.eval()
    try:
        with _random_state_kept(), trainer.accelerator.autocast():
            outputs = [model(**batch, num_items_in_batch=torch.tensor(count)) for count in counts]
        return [float(output["loss"]) for output in outputs]
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    finally:
        model.train(was_training)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
