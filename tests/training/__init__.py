"""Small trainings for tests: the same one with and without a guard, and what it was seen to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.models import language_data


def arguments(output_dir: Path, **options: Any) -> TrainingArguments:
    """Six updates of four examples on the CPU, everything else off."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer(
    model: nn.Module, output_dir: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """A trainer of a language model on real text."""
    keywords = {name: options.pop(name) for name in list(options) if name in ("compute_loss_func", "optimizers")}
    return kind(
        model=model,
        args=arguments(output_dir, **options),
        train_dataset=language_data(64),
        callbacks=list(callbacks),
        **keywords,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor is the same to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


class BeforeClipping(Trainer):
    """Remembers, in float64, the norm of every gradient as it is when the Trainer is about to clip."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, float | None]] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.seen.append(
                {
                    name: None if parameter.grad is None else parameter.grad.double().norm().item()
                    for name, parameter in self.model.named_parameters(remove_duplicate=False)
                }
            )
        return loss


class Poison(TrainerCallback):
    """Not a cure: a model in whose gradient one element becomes `value` in one window, before anybody looks at it."""

    def __init__(self, parameter: nn.Parameter, window: int, value: float, micro_batches: int = 1) -> None:
        self._window = window
        self._value = value
        self._backward_passes = 0
        self._micro_batches = micro_batches
        parameter.register_post_accumulate_grad_hook(self._poison)

    def _poison(self, parameter: Tensor) -> None:
        self._backward_passes += 1
        if self._backward_passes == self._window * self._micro_batches:
            assert parameter.grad is not None
            parameter.grad.view(-1)[parameter.numel() // 2] = self._value


class Snapshots(TrainerCallback):
    """Keeps the weights as they are after each window."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.weights:
            self.weights.append(weights(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.weights.append(weights(kwargs["model"]))
