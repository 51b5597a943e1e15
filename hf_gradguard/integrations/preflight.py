"""What can be known to be wrong before training starts. Each check is one function, listed in `CHECKS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from hf_gradguard.config import GradGuardConfig
from hf_gradguard.integrations import optimizer_check, patch_check
from hf_gradguard.observe.eager import uncompiled
from hf_gradguard.observe.random_state import RandomState

Check = Callable[[Trainer], str | None]


def refuse(trainer: Trainer, config: GradGuardConfig, checkpoint: str | None = None) -> None:
    """Raises for what can't be trained at all, or not with this configuration.

    Args:
        trainer: about to train.
        config: the guard's.
        checkpoint: the folder that the training is to be resumed from, if it is.

    Raises:
        ValueError: no parameter is trainable, the training dataset is empty, a policy can't do what it should, or the
            model is patched and needs another optimizer or checkpoint, or only its config says that it is patched.
    """
    if trainer.optimizer is not None:
        optimizer_check.refuse(trainer.optimizer)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise ValueError(
            "FSDP version 1 flattens and shards parameters so that no gradient can be read for itself; use "
            "fsdp_version: 2 (accelerate launch --fsdp_version 2)"
        )
    acting = [name for name in ("clip", "accumulate") if getattr(config, name) != getattr(GradGuardConfig, name)]
    if acting and (reason := no_gradient_to_see(trainer)):
        policies = " and ".join(f"{name}={getattr(config, name)!r}" for name in acting)
        raise ValueError(f"{policies} can't work here: {reason}")
    callbacks = [c for c in trainer.callback_handler.callbacks if hasattr(c, "guard") and hasattr(c, "config")]
    if acting and len(callbacks) > 1:
        raise ValueError(f"{len(callbacks)} guards on one trainer would both act on the same gradients; give it one")
    if trainer.model is not None:
        patch_check.refuse(trainer.model, trainer.optimizer)
        if checkpoint is not None:
            patch_check.refuse_checkpoint(trainer.model, checkpoint)
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


def notices(trainer: Trainer, config: GradGuardConfig) -> list[str]:
    """What of the Trainer's own arguments has no effect, because a policy stands in its place."""
    if config.clip == "trainer" or config.dry_run:
        return []
    limit = trainer.args.max_grad_norm
    if config.clip == "none":
        return [f"clip='none': nothing is clipped, max_grad_norm={limit} has no effect"]
    return [f"clip={config.clip!r} clips in place of the Trainer, whose max_grad_norm={limit} has no effect"]


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


def unsaved_patch(trainer: Trainer) -> str | None:
    """A patch that is on a part of the model alone, and not in its checkpoints."""
    return None if trainer.model is None else patch_check.unsaved(trainer.model)


def loss_scaling(trainer: Trainer, batch: Mapping[str, Any]) -> str | None:
    """Whether the loss is divided by the number of target tokens of the whole window, as the Trainer believes of any
    model that takes keyword arguments; where it is not, accumulation adds up gradients that nobody divides.

    Found by trying, before the first update: the loss of a batch is computed as if the window held twice as many
    tokens, and must halve.

    Args:
        trainer: about to train.
        batch: its first micro-batch, as the Trainer gives it to `training_step`.
    """
    times = trainer.args.gradient_accumulation_steps
    if trainer.args.average_tokens_across_devices:
        times *= trainer.args.world_size
    if times == 1 or not trainer.model_accepts_loss_kwargs or _normalises_by_itself(trainer) or "labels" not in batch:
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


CHECKS: list[Check] = [no_gradient_to_see, data_parallel, unsaved_patch]
"""Run before every training; `loss_scaling` waits for the first batch."""


def _normalises_by_itself(trainer: Trainer) -> bool:
    has_own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    return has_own_loss or trainer.compute_loss_func is not None or trainer.label_smoother is not None


@torch.no_grad()
def _losses_for(trainer: Trainer, batch: Mapping[str, Any], counts: tuple[int, ...]) -> list[float] | None:
    model: Any = trainer.model
    was_training, before = model.training, RandomState.capture()
    batch = {key: value.to(trainer.args.device) if hasattr(value, "to") else value for key, value in batch.items()}
    model.eval()
    try:
        # A compiled model would be compiled once more, for evaluation.
        with uncompiled(), trainer.accelerator.autocast():
            outputs = [model(**batch, num_items_in_batch=torch.tensor(count)) for count in counts]
        return [float(output["loss"]) for output in outputs]
    except Exception:  # what is wrong with the model or the batch is raised again, in its place, by training
        return None
    finally:
        model.train(was_training)
        before.restore()
