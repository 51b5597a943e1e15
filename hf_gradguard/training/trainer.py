"""The Trainer of the recipes, and how a run goes from its first line to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradguard.callback import GradGuardCallback
from hf_gradguard.config import GradGuardConfig
from hf_gradguard.guard import GradGuard
from hf_gradguard.integrations.checkpoint import save_held
from hf_gradguard.patch.applied import applied_to
from hf_gradguard.patch.optimizer import param_groups
from hf_gradguard.training import card, checkpoints
from hf_gradguard.training.arguments import RecipeArguments
from hf_gradguard.training.preemption import EXIT_CODE, Preemption
from hf_gradguard.training.tokenizer import FOLDER as TOKENIZER


class RecipeTrainer(Trainer):
    """A Trainer with a guard that ends well at SIGTERM, steps patched models with the groups that they need, and writes
    a model card with what the gradients did.

    Args:
        guard: the guard's configuration.
        origin: where model and text come from, for the card.
        **kwargs: those of Trainer, by name.
    """

    def __init__(self, *, guard: GradGuardConfig, origin: card.Origin, **kwargs: Any) -> None:
        args: RecipeArguments = kwargs["args"]
        self.guard_config = guard
        self.origin = origin
        self.preemption = Preemption()
        self.results: dict[str, float] = {}
        """Values of the last evaluation of each split."""
        self.evaluated: Any = kwargs.get("eval_dataset")
        """What is evaluated, or was last."""
        callbacks = [self.preemption, GradGuardCallback(guard), checkpoints.Processes(args.world_size)]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(callbacks=callbacks, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader[Any]) -> Any:
        """As Trainer's; a run that has reached its end has no epoch left, where Trainer would make one more update."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        assert isinstance(args, RecipeArguments)
        checkpoint = args.resume_from_checkpoint
        if checkpoint is not None and _has_ended(Path(checkpoint), max_steps, args.early_stopping_patience):
            epochs = 0
        return epochs, *others, max_steps

    @property
    def guard(self) -> GradGuard | None:
        """The guard of the training, once it has begun."""
        callbacks = [item for item in self.callback_handler.callbacks if isinstance(item, GradGuardCallback)]
        return callbacks[0].guard if callbacks else None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Trainer's; keeps what was found for the card."""
        self.evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.results.update({key: value for key, value in found.items() if isinstance(value, (int, float))})
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. A checkpoint, of which the model is written first, gets the gradients that the guard holds as
        well: written when all else is, they would be missing after a kill from one that looks whole."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.guard is not None:
            save_held(self.guard, Path(output_dir), is_main=self.args.should_save)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As Trainer's; a patched model, whose rates may be scaled by depth and width, gets the groups made for it."""
        model = cast(PreTrainedModel, self.model if model is None else model)
        if self.optimizer is not None or applied_to(model) is None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = param_groups(
            model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay, eps=options.get("eps")
        )
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """As Trainer's, or with `--epoch_decay` a rate that stays for some epochs and falls from each to the next."""
        args: RecipeArguments = self.args  # type: ignore[assignment]
        if args.epoch_decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor, after = args.epoch_decay, args.epoch_decay_after
        rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        updates = math.ceil(len(self.train_dataset) / rows)  # type: ignore[arg-type]
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(
            optimizer,
            lambda update: factor ** max(0, update // updates + 1 - after),
        )
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder, in place of Trainer's."""
        if self.is_world_process_zero():
            text = card.write(self, self.origin, self.results)
            Path(str(self.args.output_dir), "README.md").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """What is wrong with the options or the data is one line and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GRADGUARD_TRACEBACK"):
            raise
        name = Path(sys.argv[0]).name
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def begin(args: RecipeArguments, *options: Any) -> None:
    """Takes the output folder, finds the checkpoint to go on from, and seeds all random numbers.

    Args:
        args: of the training; `resume_from_checkpoint` is set to what is found, where it is not given.
        *options: dataclasses whose values a run can't change when it goes on.

    Raises:
        ValueError: the folder holds something else, or a run with other options.
    """
    essentials = {name: value for item in options for name, value in dataclasses.asdict(item).items()}
    essentials["seed"] = args.seed
    folder = str(args.output_dir)
    if str(args.resume_from_checkpoint).lower() in ("true", "auto"):
        args.resume_from_checkpoint = None
    with args.main_process_first(local=False, desc="output folder"):
        if args.should_save:
            _forget_false_start(Path(folder), essentials)
        checkpoints.claim(folder, essentials, is_main=args.should_save)
        if args.should_save:
            for line in checkpoints.set_aside(folder):
                say(args, line)
    if args.resume_from_checkpoint is None:
        found = checkpoints.last_whole(folder)
        args.resume_from_checkpoint = None if found is None else str(found)
    else:
        _check_given(str(args.resume_from_checkpoint))
    if args.resume_from_checkpoint is not None:
        say(args, f"Going on from {args.resume_from_checkpoint}.")
    if args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        datasets.disable_progress_bars()
    set_seed(args.seed)


def conduct(trainer: RecipeTrainer, tests: Mapping[str, Any]) -> dict[str, float]:
    """Trains, evaluates, and writes model, card and report; the last lines say what came of it and where it lies.

    Args:
        trainer: ready to train.
        tests: what to evaluate at the end, by the prefix of its metrics: `eval` for the validation split, `test`.

    Returns:
        The metrics.

    Raises:
        SystemExit: with the code of SIGTERM, where the run was asked to end before its time.
    """
    args, started = trainer.args, time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:
        trainer.preemption.release()
    if trainer.preemption.has_ended_training:
        say(args, f"SIGTERM: saved after update {trainer.state.global_step}. The same command goes on from there.")
        raise SystemExit(EXIT_CODE)
    trainer.save_model()
    for prefix, rows in tests.items():
        trainer.save_metrics(prefix, trainer.evaluate(rows, metric_key_prefix=prefix))
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        _last_lines(trainer, tests, time.monotonic() - started)
    return trainer.results


def first_batch(rows: Any, args: RecipeArguments, collator: Any) -> dict[str, Any]:
    """The first micro-batch of rows that are not shuffled, for a patch that measures one."""
    return dict(next(iter(DataLoader(rows, batch_size=args.per_device_train_batch_size, collate_fn=collator))))


def evaluated_splits(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `conduct` evaluates, by the prefix of its metrics: `eval` for validation, `test` where there is one."""
    return {"eval": data["validation"], **({"test": data["test"]} if "test" in data else {})}


def say(args: TrainingArguments, text: str) -> None:
    """Prints a line, once for all processes."""
    if args.process_index == 0:
        print(text, flush=True)


def _forget_false_start(folder: Path, essentials: Mapping[str, Any]) -> None:
    """Empties the folder of a run that has not come to its first update and had other options: often they were wrong,
    which is why it has not."""
    own = folder / checkpoints.OWN_FILE
    held = list(folder.iterdir()) if folder.is_dir() else []
    if not own.is_file() or {path.name for path in held} - {own.name, TOKENIZER, f"incomplete-{TOKENIZER}"}:
        return
    if json.loads(own.read_text(encoding="utf-8")) == essentials:
        return
    own.unlink()
    for path in held:
        shutil.rmtree(path, ignore_errors=True)


def _has_ended(checkpoint: Path, max_steps: int, patience: int | None) -> bool:
    """Whether a checkpoint is that of the last update, or of the evaluation that has stopped the run early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    waited: int = stopping.get("early_stopping_patience_counter", 0)
    return bool(state["global_step"] >= max_steps) or (patience is not None and waited >= patience)


def _check_given(checkpoint: str) -> None:
    if not Path(checkpoint).is_dir():
        raise ValueError(f"--resume_from_checkpoint {checkpoint!r}: there is no such folder")
    if (reason := checkpoints.what_is_broken(Path(checkpoint))) is not None:
        raise ValueError(f"--resume_from_checkpoint {checkpoint!r} is not whole: {reason}")


def _last_lines(trainer: RecipeTrainer, tests: Mapping[str, Any], seconds: float) -> None:
    folder = Path(str(trainer.args.output_dir))
    print()
    for prefix in tests:
        names = ("perplexity", "perplexity_per_word", "token_accuracy", "accuracy", "f1", "loss")
        values = {name: trainer.results.get(f"{prefix}_{name}") for name in names}
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if value is not None)
        print(f"{'Validation' if prefix == 'eval' else prefix.capitalize()}: {told}")
    print(f"Trained and evaluated in {seconds / 60:.1f} minutes, {_peak_memory()}.")
    print(f"Model:  {folder} (README.md is its card)")
    if (report := _write_report(folder, trainer.guard)) is not None:
        print(f"Report: {report}")
    sys.stdout.flush()


def _write_report(folder: Path, guard: GradGuard | None) -> str | None:
    if guard is None or not guard.config.record:
        return None
    from importlib.util import find_spec

    if find_spec("altair") is None:
        return f"gradguard report {folder}, after pip install 'hf-gradguard[report]'"
    from hf_gradguard.report import load_runs, write_report

    (run,) = load_runs([guard.config.record_dir or folder])
    page = run.record.segments[-1].path.parent / "report.html"
    write_report(run, page)
    return page.resolve().as_uri()


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU's memory"
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"
