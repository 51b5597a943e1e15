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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from hf_gradguard.config import GradGuardConfig
from hf_gradguard.events import Event
from hf_gradguard.guard import GradGuard
from hf_gradguard.integrations import checkpoint, preflight
from hf_gradguard.integrations.standin import StandIn
from hf_gradguard.integrations.trainer import TrainerHold, calling_trainer, has_callback


class GradGuardCallback(TrainerCallback, ExportableState):
    """Watches the gradient of every parameter and layer at every update, says what is wrong, and skips updates whose
    gradients are not finite.

    Args:
        config: what to do, as an object or as the mapping that its `to_dict` gives; made of the options alone where it
            is None.
        **options: fields of `GradGuardConfig`, which take precedence over `config`.

    Raises:
        ValueError: an unknown option or an impossible value.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradGuardCallback()])  # doctest: +SKIP
    """

    def __init__(self, config: GradGuardConfig | dict[str, Any] | None = None, **options: Any) -> None:
        if isinstance(config, dict):
            config = GradGuardConfig.from_dict(config)
        self.config = (config or GradGuardConfig()).replace(**options)
        self.guard: GradGuard | None = None
        self.saved: dict[str, Any] | None = None
        """State of a guard from a checkpoint, which the next training goes on from."""
        self.resumed_from: str | None = None
        """The checkpoint that `trainer.train` was told to go on from, where that is known."""
        self._hold: TrainerHold | None = None
        self._trials = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy, also one in a file, has the configuration and nothing of a run.
        return {**vars(self), "guard": None, "_hold": None}

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
            max_steps=state.max_steps,
            is_main=state.is_world_process_zero,
            watch_forward=False,
        )
        self._resume(args, state)
        if trainer is None:
            return
        self._hold = TrainerHold(trainer, self, self.guard)
        self._speak_before_training(trainer, state.global_step)

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
            if self._hold is not None and self.guard.must_leave_no_trace:
                self._hold.hold_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hold is not None:
            self._hold.let_go()
        if self.guard is not None:
            self.guard.after_step(updated=not getattr(kwargs.get("optimizer"), "step_was_skipped", False))
            if self._hold is not None and self.guard.schedule_waits:
                self._hold.hold_schedule()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._hold is not None:
            self._hold.let_go()
        if self.guard is not None:
            self.guard.end_window()
            control.should_training_stop |= self.guard.should_stop
            self._flush_before_saving(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush_before_saving(control)

    # What is saved with a checkpoint

    def state(self) -> dict[str, Any]:
        """What Trainer keeps in `trainer_state.json`."""
        attributes = {} if self.guard is None else {"saved": checkpoint.small_state(self.guard)}
        return {"args": {"config": self.config.to_dict()}, "attributes": attributes}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.flush()
            checkpoint.save_held(self.guard, _checkpoint_dir(args, state), is_main=args.should_save)

    def _flush_before_saving(self, control: TrainerControl) -> None:
        # A kill between checkpoint and on_save would lose what a run that goes on from there does not write again.
        if self.guard is not None and control.should_save:
            self.guard.flush()

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Goes on from what was saved with the checkpoint that the Trainer has loaded, if it has loaded one."""
        states: Any = state.stateful_callbacks  # typed as a list, holds a dictionary by name
        stored = states.get(type(self).__name__)
        # Where the checkpoint was saved without a guard there is no entry, without which Trainer can't save the next.
        states.setdefault(type(self).__name__, self.state())
        attributes = stored.get("attributes", {}) if isinstance(stored, dict) else {}
        saved, self.saved = self.saved or attributes.get("saved"), None
        if self.guard is None or saved is None or state.global_step == 0:
            return
        places = [Path(place) for place in (self.resumed_from,) if place] + [_checkpoint_dir(args, state)]
        checkpoint.restore(self.guard, saved, places)

    def _output_dir(self, args: TrainingArguments, state: TrainerState) -> Path:
        if not state.is_hyper_param_search:
            return Path(args.output_dir or ".")
        self._trials += 1
        return Path(args.output_dir or ".") / f"trial-{self._trials - 1}"

    def _speak_before_training(self, trainer: Trainer, step: int) -> None:
        assert self.guard is not None
        for message in preflight.notices(trainer, self.config):
            self.guard.say(Event("notice", step, message=message))
        for message in preflight.warnings_before_training(trainer):
            self.guard.say(Event("warning", step, message=message))


def _checkpoint_dir(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class _Training:
    """Stands in front of `trainer.train`: refuses what can't be trained, and puts everything back however it ends."""

    def __init__(self, trainer: Trainer, callback: GradGuardCallback) -> None:
        self._trainer = trainer
        self._callback = callback

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_callback(self._trainer, self._callback):
            return original(*args, **kwargs)
        self._callback.resumed_from = self._checkpoint(*args, **kwargs)
        preflight.refuse(self._trainer, self._callback.config, self._callback.resumed_from)
        try:
            return original(*args, **kwargs)
        except KeyboardInterrupt:
            self._end("interrupted", "by the keyboard")
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._end("finished")

    def _end(self, status: str, message: str = "") -> None:
        # The Trainer may have put another callback in the place of ours: restore_callback_states_from_checkpoint does.
        for callback in (self._callback, *self._trainer.callback_handler.callbacks):
            if isinstance(callback, GradGuardCallback):
                callback.end(status, message)

    def _checkpoint(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> str | None:
        if resume_from_checkpoint is True:
            found: str | None = get_last_checkpoint(self._trainer.args.output_dir)  # type: ignore[no-untyped-call]
            return found
        return resume_from_checkpoint or None
