"""How a callback reaches the trainer that runs it, and stands in front of what it calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

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

    `Accelerator.backward` tells the loss and the end of each backward pass; `Accelerator.clip_grad_norm_`, and on
    meshes of several kinds `Trainer._mixed_mesh_grad_norm`, are where gradients are complete and not yet clipped;
    `Trainer.log` carries our numbers to every integration.

    All of it lets go by itself when the callback is no longer among the trainer's: a training that ended with an
    exception may have left it in place.
    """

    def __init__(self, trainer: Trainer, callback: TrainerCallback, guard: GradGuard) -> None:
        self._trainer = trainer
        self._callback = callback
        self._guard = guard
        self._stand_ins: list[StandIn] = []
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
        for stand_in in reversed(self._stand_ins):
            stand_in.remove()

    def _backward(self, original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        result = original(loss, **kwargs)
        self._guard.micro_batch(loss, complete=self._trainer.accelerator.sync_gradients)
        return result

    def _clip(
        self, original: Callable[..., Any], parameters: Any, max_norm: float, norm_type: float = 2, **kwargs: Any
    ) -> Tensor | None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not self._guard.owns(parameters) or norm_type != 2:
            return original(parameters, max_norm, norm_type, **kwargs)  # type: ignore[no-any-return]
        # Under a scaler gradients must be unscaled before they are measured, and can be unscaled only once.
        self._trainer.accelerator.unscale_gradients()
        unscale = StandIn(self._trainer.accelerator, "unscale_gradients", lambda original, *args, **kwargs: None)
        try:
            return self._guard.clip(
                max_norm,
                parameters,
                lambda: original(parameters, max_norm, norm_type, **kwargs),
                always=not self._clip_stand_in.stands_before_stock(),
            )
        finally:
            unscale.remove()

    def _mixed_mesh_norm(self, original: Callable[..., Any], model: torch.nn.Module, max_norm: float) -> Tensor | None:
        parameters = list(model.parameters())
        if not self._guard.owns(parameters):
            return original(model, max_norm)  # type: ignore[no-any-return]
        return self._guard.clip(max_norm, parameters, lambda: original(model, max_norm), always=True)

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._guard.metrics())
        original(logs, *args, **kwargs)
