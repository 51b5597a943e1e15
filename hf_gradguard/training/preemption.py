"""A polite kill: at SIGTERM the run saves a checkpoint after the update it is at, on all processes alike, and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell makes of a process that SIGTERM has ended; the run is not finished."""


class Preemption(TrainerCallback):
    """Saves and ends at SIGTERM.

    Clusters send it some time before they take a machine away. On several processes it may arrive in different updates;
    each update they tell one another (one number), and all end with the one after the first has heard of it.
    """

    def __init__(self) -> None:
        self.is_asked = False
        """Whether this process has got the signal."""
        self.has_ended_training = False
        self._original: Any = None
        self._told: tuple[Any, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._original = signal.signal(signal.SIGTERM, self._hear) or signal.SIG_DFL

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._all_know(args):
            self.has_ended_training = control.should_save = control.should_training_stop = True
            if args.save_strategy == "best":  # which would save only what an evaluation finds better
                control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.has_ended_training:
            # The checkpoint knows which was best. Trainer would load that now, and delete all others but it.
            args.load_best_model_at_end = False
            state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signal back to whom it belonged before; also after a training that has failed."""
        if self._told is not None:
            self._told[0].wait()
            self._told = None
        if self._original is not None:
            signal.signal(signal.SIGTERM, self._original)
            self._original = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def _all_know(self, args: TrainingArguments) -> bool:
        if args.world_size == 1 or not dist.is_initialized():
            return self.is_asked
        told, self._told = self._told, self._tell(args)
        if told is None:
            return False
        work, flag = told
        work.wait()
        return bool(flag.item())

    def _tell(self, args: TrainingArguments) -> tuple[Any, torch.Tensor]:
        flag = torch.tensor([float(self.is_asked)], device=args.device)
        return dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True), flag
