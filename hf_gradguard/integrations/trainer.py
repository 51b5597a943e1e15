"""How a callback reaches the trainer that runs it, and stands in front of what it calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_gradguard.events import Event
from hf_gradguard.integrations import preflight
from hf_gradguard.integrations.scaler import unscale_once
from hf_gradguard.integrations.standin import StandIn

if TYPE_CHECKING:
    from hf_gradguard.guard import GradGuard


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer whose event the callback is being told of.

    Trainer gives a callback the model and the optimizer, never itself or its accelerator, and no public attribute of
    what it gives leads there. But it is the trainer that calls: it is the `self` of a frame below.

    Returns:
        None where something else than a Trainer runs the callback.
    """
    frame = inspect.currentframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and has_callback(candidate, callback):
            return candidate
        frame = frame.f_back
    return None


def has_callback(trainer: Trainer, callback: TrainerCallback) -> bool:
    """Whether this very callback is among the trainer's."""
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(known is callback for known in handler.callbacks)


class TrainerHold:
    """What stands in front of one trainer's methods during one training, all of it on its own objects.

    `Trainer.training_step` shows each micro-batch, and is what can be repeated; `Accelerator.backward` tells the loss
    and the end of each backward pass; `Accelerator.clip_grad_norm_`, and on meshes of several kinds
    `Trainer._mixed_mesh_grad_norm`, are where gradients are complete and not yet clipped; the optimizer's `step` is
    where a window without an update must leave no trace; `Trainer.log` carries our numbers to every integration.

    All of it lets go by itself when the callback is no longer among the trainer's: a training that ended with an
    exception may have left it in place.
    """

    def __init__(self, trainer: Trainer, callback: TrainerCallback, guard: GradGuard) -> None:
        self._trainer = trainer
        self._callback = callback
        self._guard = guard
        self._stand_ins: list[StandIn] = []
        self._brief: list[StandIn] = []
        self._tries_loss = guard.config.check_loss_scaling
        self._count = TargetTokens(trainer) if guard.config.accumulates else None
        self._stand_before(trainer, "training_step", self._training_step)
        self._clip_stand_in = self._stand_before(trainer.accelerator, "clip_grad_norm_", self._clip)
        self._stand_before(trainer.accelerator, "backward", self._backward)
        self._stand_before(trainer, "log", self._log)
        if hasattr(trainer, "_mixed_mesh_grad_norm"):
            self._stand_before(trainer, "_mixed_mesh_grad_norm", self._mixed_mesh_norm)

    def _stand_before(self, owner: Any, name: str, replacement: Callable[..., Any]) -> StandIn:
        def replace(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not has_callback(self._trainer, self._callback):
                self.release()
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        self._stand_ins.append(StandIn(owner, name, replace))
        return self._stand_ins[-1]

    def release(self) -> None:
        """Puts everything back."""
        self.let_go()
        for stand_in in reversed(self._stand_ins):
            stand_in.remove()

    def hold_step(self) -> None:
        """Makes the optimizer's next step one of the guard's, until `let_go`."""
        self._brief.append(StandIn(self._trainer.optimizer, "step", self._guard.make_step))

    def hold_schedule(self) -> None:
        """Makes the next step of the learning-rate schedule one that does nothing, until `let_go`."""
        self._brief.append(StandIn(self._trainer.lr_scheduler, "step", lambda original, *args, **kwargs: None))

    def let_go(self) -> None:
        """Ends `hold_step` and `hold_schedule`, which last as short as possible: a schedule wraps the step of its
        optimizer when it is made, and its state, as it is saved, is all that its object holds."""
        while self._brief:
            self._brief.pop().remove()

    def _training_step(
        self, original: Callable[..., Any], model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._guard.is_replaying:
            return original(model, inputs, *args, **kwargs)
        if self._tries_loss:
            self._tries_loss = False
            if message := preflight.loss_scaling(self._trainer, inputs):
                self._guard.say(Event("warning", self._guard.step_number, message=message))
        # Some take out of their inputs what they need, the second time from the copy as well.
        kept = copy.copy(inputs)
        self._guard.begin_micro_batch(lambda: original(model, copy.copy(kept), *args, **kwargs), kept)
        if self._count is not None:
            self._count.look(inputs, *args, **kwargs)
        return original(model, inputs, *args, **kwargs)

    def _backward(self, original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        result = original(loss, **kwargs)
        if not self._guard.is_replaying:
            complete = self._trainer.accelerator.sync_gradients
            weight = None if self._count is None else self._count.of_micro_batch(complete=complete)
            self._guard.micro_batch(loss, complete=complete, weight=weight)
        return result

    def _clip(
        self, original: Callable[..., Any], parameters: Any, max_norm: float, norm_type: float = 2, **kwargs: Any
    ) -> Tensor | None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        accelerator = self._trainer.accelerator
        if not self._guard.owns(parameters) or not accelerator.sync_gradients or self._guard.is_replaying:
            return original(parameters, max_norm, norm_type, **kwargs)  # type: ignore[no-any-return]
        # Under a scaler gradients must be unscaled before they are measured, and can be unscaled only once.
        unscale_once(accelerator)
        unscale = StandIn(accelerator, "unscale_gradients", lambda original, *args, **kwargs: None)
        try:
            return self._guard.clip(
                max_norm if norm_type == 2 else None,
                parameters,
                lambda: original(parameters, max_norm, norm_type, **kwargs),
                always=not self._clip_stand_in.stands_before(Accelerator),
            )
        finally:
            unscale.remove()

    def _mixed_mesh_norm(self, original: Callable[..., Any], model: torch.nn.Module, max_norm: float) -> Tensor | None:
        parameters = list(model.parameters())
        if not self._guard.owns(parameters):
            return original(model, max_norm)  # type: ignore[no-any-return]
        return self._guard.clip(max_norm, parameters, lambda: original(model, max_norm), always=True)

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._guard.is_replaying:
            return
        if "loss" in logs:
            logs.update(self._guard.metrics())
        original(logs, *args, **kwargs)


class TargetTokens:
    """Counts the target tokens of each micro-batch as the Trainer does, who divides by them where the model lets it."""

    def __init__(self, trainer: Trainer) -> None:
        self._processes = trainer.args.world_size
        self._is_global = trainer.args.average_tokens_across_devices and self._processes > 1
        names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        model: Any = trainer.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shifts = type(base).__name__ in names
        self._of_window: Tensor | float | None = None
        self._of_inputs: Tensor | float | None = None

    def look(
        self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """To be called with what `Trainer.training_step` is given."""
        self._of_inputs = self._of_window = None
        if num_items_in_batch is not None:
            self._of_window = num_items_in_batch / self._processes if self._is_global else num_items_in_batch
            return
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if isinstance(labels, Tensor):
            counted = labels[..., 1:] if self._shifts and labels.ndim > 1 else labels
            self._of_inputs = (counted != -100).sum()

    def of_micro_batch(self, *, complete: bool) -> Tensor | float | None:
        """Target tokens of the micro-batch on this process, None where there is nothing to count. The Trainer's count
        is of the whole window: it is given for the last micro-batch, and zero for the others."""
        if self._of_window is not None:
            return self._of_window if complete else 0.0
        return self._of_inputs
