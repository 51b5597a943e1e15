"""The guard: one update = observe → judge → act → record. The only place that knows all four."""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard.act import clipping, sentences
from hf_gradguard.act.accumulation import Accumulator, Taken
from hf_gradguard.act.nonfinite import drop_gradients
from hf_gradguard.act.policies import Policies
from hf_gradguard.backends.dtensor import is_sharded
from hf_gradguard.config import GradGuardConfig
from hf_gradguard.events import ROUTINE, Event
from hf_gradguard.integrations import optimizer_check, patch_check
from hf_gradguard.integrations.loop import ForwardPasses
from hf_gradguard.integrations.scaler import unscale_once
from hf_gradguard.judge import SEVERITY, Judge, Verdict, stacks_of
from hf_gradguard.observe import origin
from hf_gradguard.observe.fault import Fault, find_fault
from hf_gradguard.observe.layout import Layout
from hf_gradguard.observe.norms import NO_GRADIENT, HostCopy, Measurement
from hf_gradguard.observe.profiler import TimeProfiler
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.observe.reading import Reading
from hf_gradguard.observe.replay import Replays
from hf_gradguard.observe.structure import read_layout
from hf_gradguard.observe.weights import WeightProbe, WeightReading
from hf_gradguard.record.facts import run_facts
from hf_gradguard.record.writer import AccumulationRow, RecordWriter, Window
from hf_gradguard.window import WindowUnderWay

logger = logging.getLogger(__name__)

_REQUIRES_GRAD = attrgetter("requires_grad")
_SHARING = ("DEEPSPEED", "MEGATRON_LM")
"""Kinds of distributed training that share out weights in a way of their own."""
_COUNTS = ("windows", "updates", "skipped", "clipped", "deferred")


class GradGuard:
    """Watches the gradients of one model through one training run, and acts on them as its configuration says.

    The Trainer's callback makes one and calls it; in your own loop make it after `accelerator.prepare` and call
    `step` in place of clipping, `optimizer.step`, `scheduler.step` and `zero_grad`.

    Args:
        model: the model, wrapped or not.
        optimizer: what steps it; needed for `step`.
        config: what to do, as an object or as a mapping of its fields; by default everything is watched and updates
            with a NaN or an infinity are skipped.
        accelerator: of your loop, if it has one: accumulation and unscaling of fp16 go by it.
        lr_scheduler: stepped by `step`, once a window or once an update as `config.lr_schedule` says.
        output_dir: the record goes to `gradguard/` in it; by default the accelerator's project directory, else the
            current one.
        arguments: the TrainingArguments, where there are any, to keep in the record.
        start_step: the number of windows made before, for a run that goes on.
        max_steps: the window that ends training, which always updates; in your own loop call `update` in its place.
        is_main: whether this process writes the record and speaks.
        watch_forward: whether to note each forward pass, so that one that goes wrong can be repeated; False where
            somebody calls `begin_micro_batch`.

    Raises:
        ValueError: the model has no trainable parameter, a policy can't work with this model or way of training, or the
            model is patched and the optimizer was made before that or needs `param_groups`, or only its config says
            that it is patched.
        OSError: the record can't be written.

    Example:
        >>> guard = GradGuard(model, optimizer, accelerator=accelerator, lr_scheduler=scheduler)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     with accelerator.accumulate(model):
        ...         loss = model(**batch).loss
        ...         accelerator.backward(loss)
        ...         guard.step(loss, num_tokens=(batch["labels"] != -100).sum())
        >>> guard.update()  # what a policy still holds back
        >>> guard.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        config: GradGuardConfig | dict[str, Any] | None = None,
        *,
        accelerator: Any = None,
        lr_scheduler: Any = None,
        output_dir: str | Path | None = None,
        arguments: Any = None,
        start_step: int = 0,
        max_steps: int | None = None,
        is_main: bool | None = None,
        watch_forward: bool = True,
    ) -> None:
        patch_check.refuse(model, optimizer)
        if optimizer is not None:
            optimizer_check.refuse(optimizer)
        self.config = GradGuardConfig.from_dict(config) if isinstance(config, dict) else config or GradGuardConfig()
        self.layout: Layout
        self.reading: Reading | None = None
        self.events: list[Event] = []
        self.weights: WeightReading | None = None
        self.time_profile: TimeProfile | None = None
        self.run_id = uuid.uuid4().hex
        self.step_number = start_step
        self.windows = 0
        self.updates = 0
        self.skipped = 0
        self.clipped = 0
        self.deferred = 0
        self.should_stop = False
        self._model: Any = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._lr_scheduler = lr_scheduler
        self._max_steps = max_steps
        kind = getattr(accelerator, "distributed_type", "")
        self._policies = Policies(self.config, str(getattr(kind, "value", kind)))
        self._replays = Replays(model, budget=int(self.config.replay and self._processes == 1))
        self._forward_passes = ForwardPasses(model, self) if watch_forward else None
        self._batch_size: float | None = None
        self._run = run_facts(model, arguments, self.config)
        self._directory = self._record_directory(output_dir)
        self._is_main = is_main if is_main is not None else getattr(accelerator, "is_main_process", True)
        self._started = time.monotonic()
        self._record: RecordWriter | None = None
        self._is_open = True
        self._window = WindowUnderWay()
        self._said: set[str] = set()
        self._read_layout()
        obstacle = self._obstacle_to_time_profiles()
        self._profiler = TimeProfiler(model, self.config.time_profile_every, max_steps, obstacle)

    # One window, from the first forward pass to the optimizer's step

    def owns(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these parameters are the guarded model's."""
        return any(id(parameter) in self._ids for parameter in parameters)

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a part of the gradients."""
        return self._is_sharded

    @property
    def is_replaying(self) -> bool:
        """Whether a micro-batch is being run again: what model and Trainer do now is no part of the training."""
        return self._replays.is_running

    def begin_micro_batch(self, run: Callable[[], object], inputs: Mapping[str, Any]) -> None:
        """To be called before a forward pass, so that it can be repeated if it goes wrong.

        Args:
            run: the micro-batch's forward and backward pass.
            inputs: what the model is given; only a reference is kept, to the end of the window.
        """
        if self._window.micro_batches == 0 and self._is_main and not self.is_replaying:
            self._look_back(inputs)
        self._replays.keep(self._window.micro_batches, run, inputs)

    def micro_batch(self, loss: Tensor | None, *, complete: bool, weight: Tensor | float | None = None) -> None:
        """Tells of a finished backward pass.

        Args:
            loss: what was back-propagated, a scalar.
            complete: whether this was the window's last one, so that its gradients are final.
            weight: the number of target tokens on this process; None where there are none to count.
        """
        window = self._window
        window.micro_batches += 1
        window.measurement = None
        if loss is not None:
            loss = loss.detach()
            window.loss = loss if window.loss is None else window.loss + loss
        if self._policies.accumulator is not None:
            window.weights.append(weight)
        if not complete and not self._has_scaler and not self._is_sharded:
            window.partial.append(Measurement(self._tensors))
            if not self._on_gpu:
                window.partial[-1].norms()  # while the gradients are those of this micro-batch
        if complete and self._on_gpu and not self._has_scaler:
            # Queued here, the norms reach the host with the Trainer's own wait for the loss. Under a scaler they are
            # final only after it has unscaled them.
            self._measure().note_versions()

    def clip(
        self,
        max_norm: float | None,
        parameters: Sequence[nn.Parameter],
        stock: Callable[[], Tensor | None],
        *,
        always: bool,
    ) -> Tensor | None:
        """Takes the reading, does what the policies say, and clips as the Trainer would where none of them clips.

        Args:
            max_norm: the limit; infinity where only the norm is wanted, None where it is not the L2 norm that is
                limited.
            parameters: what the Trainer clips.
            stock: what the Trainer would have called.
            always: call `stock` in every window: others rely on being called.

        Returns:
            The total norm before clipping: of the accumulated gradient in a window that updates.
        """
        window, measurement = self._window, self._measure_finally()
        is_all = {id(parameter) for parameter in parameters if parameter.requires_grad} == self._trained_ids
        # What was measured tells of all gradients together, before anybody has clipped them.
        needs_stock = always or max_norm is None or not is_all or not measurement.has_gradients or window.has_clipped
        window.has_clipped = True
        if self._reads_late:
            window.max_norm = max_norm if is_all else None
            if needs_stock or max_norm is None:
                return stock()
            return clipping.trainers_own(parameters, max_norm, None, stock, measurement.stock_total)
        self._act()
        total_norm = self._read().total_norm if window.total_norm is None else window.total_norm
        if self._policies.replaces_clip:
            return torch.tensor(total_norm)
        if not window.makes_update:
            if needs_stock:
                stock()
            return torch.tensor(total_norm)
        window.max_norm = max_norm if is_all else None
        if needs_stock or max_norm is None or window.decision == "observe":
            return stock()
        is_own = window.taken is None or not window.taken.gradient_was_replaced
        stock_total = measurement.stock_total if is_own else None
        return clipping.trainers_own(parameters, max_norm, total_norm, stock, stock_total)

    def before_step(self) -> None:
        """To be called when clipping is done and the optimizer is about to step."""
        window = self._window
        if not window.is_final and self._has_scaler:  # nobody of whom we know has unscaled
            unscale_once(self._accelerator, self._optimizer)
        self._measure_finally()
        if not self._reads_late:
            self._act()
        if window.makes_update and self._wants_weights():
            window.probe = WeightProbe(self._tensors, through_fp16=self._has_scaler)

    @property
    def must_leave_no_trace(self) -> bool:
        """Whether the optimizer's step has to go through `make_step`."""
        return self._window.bypasses_scaler or not self._window.makes_update

    def make_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the optimizer's step. In a window without an update it finds no parameters: merely without gradients,
        some optimizers would still count a step.

        Args:
            step: the optimizer's; args and kwargs are passed on to it.
        """
        window = self._window
        if window.bypasses_scaler:
            _inner(self._optimizer).step()
        if window.makes_update and not window.bypasses_scaler:
            return step(*args, **kwargs)
        groups, self._optimizer.param_groups = self._optimizer.param_groups, []
        try:
            return step(*args, **kwargs)
        finally:
            self._optimizer.param_groups = groups

    def after_step(self, *, updated: bool = True) -> None:
        """To be called after the optimizer's step.

        Args:
            updated: False if the optimizer made no update, as under a scaler that met an infinity.
        """
        window = self._window
        # The fused AdamW reports no skip: it is called all the same, and told of the infinity.
        skipped_by_scaler = self._has_scaler and bool(self._read().nonfinite)
        window.updated = window.bypasses_scaler or (updated and not skipped_by_scaler and window.makes_update)
        if window.probe is not None and window.updated:
            self.weights = window.probe.finish()

    def end_window(self) -> None:
        """To be called when the window is over: judges, counts and records it."""
        window, reading = self._window, self._read()
        self.step_number = reading.step
        self.windows += 1
        self.updates += window.updated
        self._account_for_clipping()
        measured = self.weights if window.probe is not None and window.updated else None
        if window.updated and window.taken is not None:
            self._batch_size = window.taken.weight
        if self._record is not None:
            self._write_rows(self._record, reading, measured)
        if not reading.nonfinite and (window.updated or window.taken is not None):
            self._pass_judgement(reading, measured)
        self._window = WindowUnderWay()
        self._replays.forget()

    @property
    def schedule_waits(self) -> bool:
        """Whether the learning-rate schedule stands still in the window under way, as `lr_schedule='updates'` asks."""
        return self.config.lr_schedule == "updates" and not self._window.updated

    def step(self, loss: Tensor | None = None, num_tokens: Tensor | int | None = None) -> None:
        """One micro-batch of your own loop, after `accelerator.backward(loss)`: in the last of a window it does what
        `clip_grad_norm_`, `optimizer.step`, `scheduler.step` and `zero_grad` would, as far as the policies let the
        optimizer step. `should_stop` becomes True when training should end.

        Args:
            loss: what was back-propagated, for the record.
            num_tokens: the number of target tokens in the micro-batch on this process, by which windows that are held
                back are weighted; without it every micro-batch counts the same.
        """
        accelerator = self._accelerator
        if not self._is_open:
            raise ValueError("the guard is closed: make a new GradGuard for a further training")
        if self._optimizer is None:
            raise ValueError("guard.step needs the optimizer: GradGuard(model, optimizer, ...)")
        complete = accelerator is None or accelerator.sync_gradients
        if loss is not None and accelerator is not None:
            loss = loss.detach() / accelerator.gradient_accumulation_steps
        self.micro_batch(loss, complete=complete, weight=num_tokens)
        if not complete:
            return
        self.before_step()
        self.make_step(self._optimizer.step)
        self.after_step(updated=not getattr(self._optimizer, "step_was_skipped", False))
        if self._lr_scheduler is not None and not self.schedule_waits:
            self._lr_scheduler.step()
        self._optimizer.zero_grad()
        self.end_window()

    def update(self) -> bool:
        """Makes the update that a policy still holds back, at the end of your own loop: returns whether there was one.
        (In a Trainer, the window that ends training does this by itself.)"""
        taken = self._policies.finish()
        if taken is None:
            return False
        self._window.taken = taken
        self._clip(taken.norms)
        # Accelerate's own step does nothing in the middle of a window, and its scaler would unscale once more.
        _inner(self._optimizer).step()
        _inner(self._optimizer).zero_grad()
        self.updates += 1
        self._account_for_clipping()
        self._window = WindowUnderWay()
        message = f"the update with the {taken.windows} windows that were held back was made at the end"
        self.say(Event("notice", self.step_number, value=taken.norm, message=message))
        return True

    # The run

    @property
    def verdict(self) -> Verdict:
        """The current verdict on the run."""
        return self._judge.verdict

    def metrics(self) -> dict[str, float]:
        """What goes into the Trainer's log."""
        reading = self.reading
        if reading is None:
            return {}
        norms = reading.layer_norms()
        found: dict[str, float] = {"gradguard/grad_norm": reading.total_norm}
        ratio = depth_ratio(norms)
        if ratio is not None:
            found["gradguard/depth_ratio"] = ratio
        accumulator = self._policies.accumulator
        for name in _COUNTS[:-1] if accumulator is None else _COUNTS:
            found[f"gradguard/{name}"] = getattr(self, name)
        if accumulator is not None:
            found["gradguard/accumulated_norm"] = reading.accumulated_norm
            if self._batch_size is not None:
                found["gradguard/batch_size"] = self._batch_size
            if not np.isnan(accumulator.noise_scale):
                found["gradguard/noise_scale"] = accumulator.noise_scale
        if self.config.log_layers:
            found |= {f"gradguard/layer_{index:03d}/grad_norm": norm for index, norm in enumerate(norms)}
        return found

    def say(self, event: Event) -> None:
        """Adds an event to the list, the record and the log. Of a routine kind, which may come in every window, only
        the first is a warning."""
        is_news = event.kind != "healthy" or not self._said.isdisjoint(SEVERITY)
        is_repetition = event.kind in self._said and (event.kind in ROUTINE or event.action == "observe")
        self._said.add(event.kind)
        self.events.append(event)
        if self._record is not None:
            self._record.event(event)
        if self._is_main:
            level = logging.DEBUG if is_repetition else logging.WARNING if is_news else logging.INFO
            logger.log(level, "GradGuard, window %d: %s: %s", event.step, event.kind, event.message)

    def summary(self) -> str:
        """What came of the run, in a few lines for people."""
        counts = [f"{self.updates} updates"]
        counts += [
            f"{getattr(self, name)} {name}" for name in ("deferred", "clipped", "skipped") if getattr(self, name)
        ]
        if self.config.dry_run:
            would = Counter(event.action for event in self.events if (event.action or "").startswith("would "))
            counts += [f"{action} {count} times" for action, count in would.items()]
        lines = [str(self.verdict), f"Run:     {', '.join(counts)}"]
        if self._record is not None:
            lines.append(f"Record:  {self._directory} (see it with: gradguard report {self._directory.parent})")
        return "GradGuard\n" + "\n".join(lines)

    def flush(self) -> None:
        """Writes to disk what the record still holds in memory."""
        if self._record is not None:
            self._record.flush()

    def close(self, status: str = "finished", message: str = "") -> None:
        """Ends the record; calling it again does nothing. What a policy still holds back is discarded, with an event.

        Args:
            status: `finished`, `stopped`, `failed` or `interrupted`.
            message: what happened, for the last two.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._forward_passes is not None:
            self._forward_passes.remove()
        self._replays.end()
        self._profiler.end()
        if held := self._policies.discard():
            self.say(sentences.discarded(self.step_number, held))
        if self._record is not None:
            self._record.close("stopped" if self.should_stop and status == "finished" else status, message)
        # What was seen can be looked at for as long as one likes; what was trained need not stay in memory for that.
        self._model = self._optimizer = self._accelerator = self._lr_scheduler = self._policies.accumulator = None
        self._tensors.clear()
        self._everything.clear()
        self._window = WindowUnderWay()

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint: JSON values, but for `held`, the held gradients by parameter name.

        It fits `accelerator.register_for_checkpointing(guard)`.
        """
        return {
            "judge": self._judge.state_dict(),
            "policies": self._policies.state_dict(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "step": self.step_number,
            "batch_size": self._batch_size,
            "held": self._policies.tensors(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. A policy starts afresh where another one was saved; with `held` left out,
        what was held back is lost.

        Raises:
            ValueError: it was saved for a model with other layers.
        """
        for name, value in state["counts"].items():
            setattr(self, name, int(value))
        self._batch_size = state["batch_size"]
        self.step_number = int(state["step"])
        if self._record is not None:
            self._record.start_at(self.step_number)
        self._policies.load_state_dict(state["policies"], state.get("held", {}))
        self._judge.load_state_dict(state["judge"])

    # Observe

    def _read_layout(self) -> None:
        self.layout, self._tensors = read_layout(self._model)
        if not self._tensors:
            raise ValueError(f"{type(self._model).__name__} has no trainable parameter: every requires_grad is False")
        self._everything = list(self._model.parameters())
        self._ids = {id(parameter) for parameter in self._everything}
        self._trained_ids = {id(parameter) for parameter in self._tensors}
        self._trainable = list(map(_REQUIRES_GRAD, self._everything))
        self._on_gpu = any(parameter.is_cuda for parameter in self._tensors)
        self._is_sharded = any(map(is_sharded, self._tensors))
        self._policies.fit(self._model, self.layout, self._tensors, self._others)
        self._judge = Judge(stacks_of(self.layout), self.config.thresholds)
        self._open_record()

    def _open_record(self) -> None:
        """Opens a segment of the record; a further one where the layout has changed."""
        if not self.config.record or not self._is_main:
            return
        is_first = self._record is None
        if self._record is not None:
            self._record.close("continued")
        try:
            self._record = RecordWriter(
                self._directory,
                self.layout,
                self._run,
                start_step=self.step_number,
                record_every=self.config.record_every,  # type: ignore[arg-type]
                flush_seconds=self.config.flush_seconds,
            )
        except OSError as error:
            if is_first:  # nothing is lost yet; later, nothing of the disk may reach training
                raise
            self._record = None
            self.say(Event("warning", self.step_number, message=f"training goes on unrecorded: {error}"))
            return
        weakref.finalize(self, self._record.flush)  # a loop that never calls `close` loses nothing either

    def _obstacle_to_time_profiles(self) -> str:
        kind = getattr(self._accelerator, "distributed_type", "")
        if not self._is_sharded and str(getattr(kind, "value", kind)) not in _SHARING:
            return ""
        return "the weights are shared out over the processes, where it would take all of them to run the model"

    def _look_back(self, inputs: Mapping[str, Any]) -> None:
        """Measures, if that is due, how far back in time the gradient reaches."""
        step = self.step_number + 1
        found = self._profiler.look(step, inputs)
        if isinstance(found, str):
            self.say(Event("notice", step, message=f"no time profile was measured: {found}"))
        elif found is not None:
            self.time_profile = found
            if self._record is not None:
                self._record.time_profile(step, found)

    def _measure(self) -> Measurement:
        window = self._window
        if window.measurement is None:
            if list(map(_REQUIRES_GRAD, self._everything)) != self._trainable:
                window.partial.clear()
                self._read_layout()
            window.measurement = Measurement(self._tensors)
            window.loss_copy = None if window.loss is None else HostCopy(window.loss.double())
            window.weight_copy = _sum_on_its_way(window.weights)
        return window.measurement

    def _measure_finally(self) -> Measurement:
        """The measurement of the gradients as they are now, just before they are clipped or used. One that was made at
        the end of the backward pass is made again where somebody has changed them since."""
        window = self._window
        if not window.is_final:
            if window.measurement is not None and not window.measurement.is_current(self._tensors):
                window.measurement = None
            window.is_final = True
        return self._measure()

    def _read(self) -> Reading:
        """Takes delivery of the norms, and decides what to do about this window."""
        window = self._window
        if window.reading is None:
            norms = self._measure().norms()
            window.reading = self.reading = Reading(
                step=self.step_number + 1,
                layout=self.layout,
                parameter_norms=norms,
                accumulated_norm=_total(norms),
                loss=None if window.loss_copy is None else float(window.loss_copy.values()),
                learning_rate=self._learning_rate(),
            )
            self._decide(window.reading)
            if self.windows == 0 and bool(np.all(window.reading.parameter_norms == NO_GRADIENT)):
                message = (
                    "no parameter has a gradient in .grad when the optimizer is about to step, so there is nothing to "
                    "watch; an optimizer that updates inside the backward pass leaves none"
                )
                self.say(Event("warning", window.reading.step, message=message))
        return window.reading

    @property
    def _has_scaler(self) -> bool:
        scaler = getattr(self._accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled()

    @property
    def _processes(self) -> int:
        return int(getattr(self._accelerator, "num_processes", 1))

    @property
    def _reads_late(self) -> bool:
        """Whether the norms are looked at only after the optimizer's step: a scaler skips by itself and waits there."""
        return self._on_gpu and self._has_scaler and not self._policies.acts_before_step

    @property
    def _others(self) -> list[nn.Parameter]:
        """What the optimizer steps besides this model: another model, a parameter of the loss."""
        groups = getattr(self._optimizer, "param_groups", [])
        return [parameter for group in groups for parameter in group["params"] if id(parameter) not in self._ids]

    def _learning_rate(self) -> float | None:
        groups = getattr(self._optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups else None

    def _wants_weights(self) -> bool:
        """Whether a probe has come due in this window or in one that was held back for it."""
        every = self.config.weights_every
        held = 0 if self._window.taken is None else self._window.taken.windows - 1
        # Underflow takes two probes to be believed; the first window's may have a learning rate of zero.
        due = range(self.step_number - held, self.step_number + 1)
        return every > 0 and any(step % every == 0 or step == every // 4 for step in due)

    # Judge and act

    def _decide(self, reading: Reading) -> None:
        policy = self._policies.overflow if self._has_scaler else self._policies.nonfinite
        decision = policy.decide(bool(reading.nonfinite))
        if decision == "skip" and self._has_scaler:
            # The scaler looks for its scale by overflowing: it skips the update by itself, and that is no alarm.
            return
        if decision is None:
            return
        fault = find_fault(reading, self._window.partial, self._window.micro_batches, self._replays)
        self._window.decision = "observe" if self.config.dry_run else decision
        self._window.makes_update = self._window.decision == "observe"
        self.skipped += not self._window.makes_update
        self.should_stop |= self._window.decision == "stop"
        accumulator = self._policies.accumulator
        held = 0 if accumulator is None else accumulator.windows
        self.say(sentences.nonfinite(reading.step, fault, decision, held, dry_run=self.config.dry_run))
        if self.config.save_batch and fault.micro_batch is not None:
            self._save_batch(reading.step, fault)
        if self._window.decision == "stop":
            self.say(sentences.stopped(reading.step, self.config.nonfinite))

    def _act(self) -> None:
        """Does to the gradients of the window under way what the policies say, once."""
        window, reading = self._window, self._read()
        if window.has_acted:
            return
        window.has_acted = True
        if not window.makes_update:
            drop_gradients([*self._everything, *self._others])
        if self._policies.accumulator is not None:
            self._accumulate(reading, self._policies.accumulator)
        taken = window.taken
        norms = reading.parameter_norms if taken is None else taken.norms
        is_replaced = taken is not None and taken.gradient_was_replaced
        window.total_norm = _total(norms) if is_replaced else reading.total_norm
        if window.makes_update and np.all(np.isfinite(norms)) and (taken is None or taken.update):
            self._clip(norms)

    def _accumulate(self, reading: Reading, accumulator: Accumulator) -> None:
        window = self._window
        is_final = self._max_steps is not None and reading.step >= self._max_steps
        if reading.nonfinite:
            if not is_final or self.config.dry_run:
                return
            # A bad window costs itself only: what was held before it is still to be used.
            window.taken = accumulator.finish()
            window.makes_update = window.taken is not None
            window.bypasses_scaler = window.makes_update and self._has_scaler
            return
        weight = self._window_weight()
        window.taken = taken = accumulator.take(reading.parameter_norms, weight, step=reading.step, final=is_final)
        window.reading = self.reading = replace(reading, accumulated_norm=taken.norm)
        if taken.update:
            self._check_overflow(taken)
            return
        window.makes_update = self.config.dry_run
        self.deferred += not window.makes_update
        self.say(sentences.deferred(reading.step, taken, dry_run=self.config.dry_run))

    def _check_overflow(self, taken: Taken) -> None:
        """Drops an accumulated gradient that the weights' own dtype can't hold, though every window's was finite."""
        half = any(parameter.dtype == torch.float16 for parameter in self._tensors)
        norms = Measurement(self._tensors).norms() if half and taken.gradient_was_replaced else taken.norms
        if np.all(np.isfinite(norms)) or self.config.dry_run:
            return
        self._window.makes_update = False
        self.skipped += 1
        drop_gradients(self._everything)
        message = (
            f"the gradient of {taken.windows} windows together is too large for the dtype of the weights: it is "
            "dropped; use reduce=mean, or hold back fewer windows"
        )
        self.say(Event("discarded", self.step_number + 1, value=taken.norm, action="discard", message=message))

    def _window_weight(self) -> float:
        """Target tokens of the window on all processes; its micro-batches where they were not counted."""
        copy, window = self._window.weight_copy, self._window
        # Whoever calls loss.backward() by himself tells of no micro-batch: then a window counts one.
        weight = float(max(window.micro_batches, 1)) if copy is None else float(copy.values())
        if self._processes == 1:
            return weight
        device = self._accelerator.device
        total = self._accelerator.reduce(torch.tensor(weight, dtype=torch.float64, device=device), "sum")
        return float(total)

    def _clip(self, norms: NDArray[np.float64]) -> None:
        self._window.clip = self._policies.clip_gradient(norms)
        if self._policies.replaces_clip:
            self._window.coefficient = 1.0

    def _account_for_clipping(self) -> None:
        """Counts a clip of the window under way, and says what a rule of ours did."""
        window = self._window
        outcome = None if window.clip is None else window.clip.outcome()
        if outcome is not None:
            self.say(sentences.clipped(self.step_number, outcome, self.layout, dry_run=self.config.dry_run))
            if not self.config.dry_run:
                window.coefficient = outcome.coefficient
        if window.max_norm is not None and window.updated and not self._read().nonfinite:
            total_norm = self._read().total_norm if window.total_norm is None else window.total_norm
            window.coefficient = clipping.stock_coefficient(window.max_norm, total_norm)
        self.clipped += window.coefficient is not None and window.coefficient < 1

    def _save_batch(self, step: int, fault: Fault) -> None:
        if fault.replayed is None:
            return
        path = self._directory / "batches" / f"window-{step:06d}-micro-batch-{fault.micro_batch}.safetensors"
        try:
            origin.save(fault.replayed, path)
            message = f"its inputs were written to {path}"
        except Exception as error:  # a disk that is full, a kind of tensor that the format does not know
            message = f"its inputs can't be written to {path} ({type(error).__name__}: {error})"
        self.say(Event("notice", step, micro_batch=fault.micro_batch, message=message))

    def _pass_judgement(self, reading: Reading, measured: WeightReading | None) -> None:
        if measured is not None:
            self._judge.probe(self._layer_means(measured.zero_share), self._layer_means(measured.stalled_share))
        verdict = self._judge.update(reading.layer_norms(), reading.total_norm)
        if verdict is None:
            return
        self.say(
            Event(
                kind=verdict.kind,
                step=reading.step,
                layer=verdict.layer,
                value=verdict.value,
                threshold=verdict.threshold,
                message=" ".join(part[:1].upper() + part[1:] for part in (verdict.message, verdict.why) if part),
            )
        )

    def _layer_means(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over the elements of each layer `[layers]` of a share known for each parameter, NaN where unknown."""
        known = ~np.isnan(share)
        sizes = np.array([info.numel for info in self.layout.parameters]) * known
        sums = self.layout.group_squares(np.where(known, share, 0.0) * sizes)
        totals = self.layout.group_squares(sizes.astype(np.float64))
        means: NDArray[np.float64] = np.divide(sums, totals, out=np.full(totals.shape, np.nan), where=totals > 0)
        return means[list(self.layout.layers)]

    # Record

    def _write_rows(self, record: RecordWriter, reading: Reading, measured: WeightReading | None) -> None:
        window = self._window
        if window.taken is not None:
            record.accumulation(
                AccumulationRow(
                    step=reading.step,
                    windows=window.taken.windows,
                    weight=window.taken.weight,
                    accumulated_norm=window.taken.norm,
                    noise_scale=window.taken.noise_scale,
                    updated=window.taken.update,
                )
            )
        record.window(
            Window(
                step=reading.step,
                loss=reading.loss,
                learning_rate=reading.learning_rate,
                total_norm=reading.total_norm,
                norms=reading.parameter_norms,
                clip_coefficient=window.coefficient,
                updated=window.updated,
                seconds=time.monotonic() - self._started,
            )
        )
        if measured is not None:
            record.weights(reading.step, measured.norms, measured.update_ratios)

    def _record_directory(self, output_dir: str | Path | None) -> Path:
        if self.config.record_dir is not None:
            return Path(self.config.record_dir)
        return Path(output_dir or getattr(self._accelerator, "project_dir", None) or ".") / "gradguard"


def depth_ratio(norms: Sequence[float]) -> float | None:
    """First layer's norm ÷ last layer's, over the layers that have a gradient; None with fewer than two."""
    seen = [norm for norm in norms if not np.isnan(norm)]
    return seen[0] / seen[-1] if len(seen) > 1 and seen[-1] > 0 else None


def _total(norms: NDArray[np.float64]) -> float:
    """L2 norm of all gradients together."""
    return float(np.sqrt(np.sum(np.square(np.where(norms == NO_GRADIENT, 0.0, norms)))))


def _inner(optimizer: Any) -> Any:
    """The optimizer that Accelerate has wrapped, or the very one."""
    return getattr(optimizer, "optimizer", optimizer)


def _sum_on_its_way(weights: Sequence[Tensor | float | None]) -> HostCopy | None:
    """The sum of numbers some of which may be on a device, without waiting for it; None where one is unknown."""
    if not weights or any(weight is None for weight in weights):
        return None
    total: Any = sum(weights)
    return HostCopy(torch.as_tensor(total).detach().double())
