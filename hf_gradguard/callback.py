"""The Trainer's callback: translates its events into calls of the guard, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_gradguard.config import GradGuardConfig
from hf_gradguard.events import Event
from hf_gradguard.guard import GradGuard
from hf_gradguard.integrations import preflight
from hf_gradguard.integrations.standin import StandIn
from hf_gradguard.integrations.trainer import TrainerHold, calling_trainer, has_callback


class GradGuardCallback(TrainerCallback, ExportableState):
    """Watches the gradient of every parameter and layer at every update, says what is wrong, and skips updates whose
    gradients are not finite.

    Args:
        config: what to do; made of the options alone where it is None.
        **options: fields of `GradGuardConfig`, which take precedence over `config`.

    Raises:
        ValueError: an unknown option or an impossible value.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradGuardCallback()])  # doctest: +SKIP
    """

    def __init__(self, config: GradGuardConfig | None = None, **options: Any) -> None:
        self.config = (config or GradGuardConfig()).replace(**options)
        self.guard: GradGuard | None = None
        self._hold: TrainerHold | None = None
        self._trials = 0

    # The run

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = calling_trainer(self)
        if trainer is not None:
            StandIn(trainer, "train", _Training(trainer, self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end("interrupted", "training was started again")  # as auto_find_batch_size does, inside train()
        trainer = calling_trainer(self)
        model = kwargs["model"] if trainer is None or trainer.model is None else trainer.model
        self.guard = GradGuard(
            model,
            kwargs.get("optimizer"),
            self.config,
            accelerator=None if trainer is None else trainer.accelerator,
            output_dir=self._output_dir(args, state),
            arguments=args,
            start_step=state.global_step,
            is_main=state.is_world_process_zero,
        )
        states: Any = state.stateful_callbacks or {}  # typed as a list, holds a dictionary by name
        saved = states.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict) and "guard" in saved.get("attributes", {}):
            self._restore(saved["attributes"]["guard"], state.global_step)
        if trainer is None:
            return
        self._hold = TrainerHold(trainer, self, self.guard)
        self._warn(trainer, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end("finished")
        if self.guard is not None and state.is_world_process_zero:
            tqdm.write(self.guard.summary())

    def end(self, status: str, message: str = "") -> None:
        """Ends the guarded run, if there is one: everything that was stood in front of is put back, the record is
        closed with that status."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None
        if self.guard is not None:
            self.guard.close(status, message)

    # One window

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is not None:
            self.guard.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard is not None:
            self.guard.after_step(updated=not getattr(kwargs.get("optimizer"), "step_was_skipped", False))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.end_window()
            control.should_training_stop |= self.guard.should_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.flush()

    # What is saved with a checkpoint

    def state(self) -> dict[str, Any]:
        """What Trainer keeps in `trainer_state.json`."""
        guard = {} if self.guard is None else {"guard": self.guard.state_dict()}
        return {"args": {"config": None}, "attributes": guard}

    def _output_dir(self, args: TrainingArguments, state: TrainerState) -> Path:
        if not state.is_hyper_param_search:
            return Path(args.output_dir or ".")
        self._trials += 1
        return Path(args.output_dir or ".") / f"trial-{self._trials - 1}"

    def _restore(self, saved: dict[str, Any], step: int) -> None:
        assert self.guard is not None
        try:
            self.guard.load_state_dict(saved)
        except (ValueError, KeyError) as error:
            message = f"the guard starts afresh, its state in the checkpoint does not fit ({error})"
            self.guard.say(Event("warning", step, message=message))

    def _warn(self, trainer: Trainer, step: int) -> None:
        messages = preflight.warnings_before_training(trainer)
        if self.config.check_loss_scaling and (message := preflight.loss_scaling(trainer)):
            messages.append(message)
        for message in messages:
            if self.guard is not None:
                self.guard.say(Event("warning", step, message=message))


class _Training:
    """Stands in front of `trainer.train`: refuses what can't be trained, and puts everything back however it ends."""

    def __init__(self, trainer: Trainer, callback: GradGuardCallback) -> None:
        self._trainer = trainer
        self._callback = callback

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_callback(self._trainer, self._callback):
            return original(*args, **kwargs)
        preflight.refuse(self._trainer)
        try:
            return original(*args, **kwargs)
        except KeyboardInterrupt:
            self._callback.end("interrupted", "by the keyboard")
            raise
        except BaseException as error:
            self._callback.end("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._callback.end("finished")
