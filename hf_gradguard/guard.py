"""The guard: one update = observe → judge → act → record. The only place that knows all four."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard.act import clipping
from hf_gradguard.act.nonfinite import Decision, drop_gradients, policies
from hf_gradguard.config import GradGuardConfig
from hf_gradguard.events import Event
from hf_gradguard.judge import SEVERITY, Judge, Verdict, stacks_of
from hf_gradguard.observe.layout import Layout
from hf_gradguard.observe.norms import NO_GRADIENT, HostCopy, Measurement
from hf_gradguard.observe.reading import Reading
from hf_gradguard.observe.structure import read_layout
from hf_gradguard.observe.weights import WeightProbe, WeightReading
from hf_gradguard.record.facts import run_facts
from hf_gradguard.record.writer import RecordWriter, Window

logger = logging.getLogger(__name__)

_REQUIRES_GRAD = attrgetter("requires_grad")


@dataclass
class _Window:
    """What is known so far of the window under way."""

    micro_batches: int = 0
    loss: Tensor | None = None
    loss_copy: HostCopy | None = None
    measurement: Measurement | None = None
    reading: Reading | None = None
    decision: Decision | None = None
    coefficient: float | None = None
    probe: WeightProbe | None = None
    updated: bool = True

    @property
    def is_dropped(self) -> bool:
        """Whether the optimizer must not see these gradients."""
        return self.decision in ("skip", "stop")


class GradGuard:
    """Watches the gradients of one model through one training run, and acts on them as its configuration says.

    The Trainer's callback makes one and calls it; in your own loop make it after `accelerator.prepare` and call
    `step` in place of clipping, `optimizer.step`, `scheduler.step` and `zero_grad`.

    Args:
        model: the model, wrapped or not.
        optimizer: what steps it; needed for `step`.
        config: what to do; by default everything is watched and updates with a NaN or an infinity are skipped.
        accelerator: of your loop, if it has one: accumulation and unscaling of fp16 go by it.
        lr_scheduler: stepped by `step`, once an update.
        output_dir: the record goes to `gradguard/` in it; by default the accelerator's project directory, else the
            current one.
        arguments: the TrainingArguments, where there are any, to keep in the record.
        start_step: the number of updates made before, for a run that goes on.
        is_main: whether this process writes the record and speaks.

    Raises:
        ValueError: the model has no trainable parameter.
        OSError: the record can't be written.

    Example:
        >>> guard = GradGuard(model, optimizer, accelerator=accelerator, lr_scheduler=scheduler)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     loss = model(**batch).loss
        ...     accelerator.backward(loss)
        ...     guard.step(loss)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        config: GradGuardConfig | None = None,
        *,
        accelerator: Any = None,
        lr_scheduler: Any = None,
        output_dir: str | Path | None = None,
        arguments: Any = None,
        start_step: int = 0,
        is_main: bool | None = None,
    ) -> None:
        self.config = config or GradGuardConfig()
        self.layout: Layout
        self.reading: Reading | None = None
        self.events: list[Event] = []
        self.weights: WeightReading | None = None
        self.step_number = start_step
        self.windows = 0
        self.updates = 0
        self.skipped = 0
        self.clipped = 0
        self.should_stop = False
        self._model = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._lr_scheduler = lr_scheduler
        self._nonfinite = policies.parse(self.config.nonfinite)
        self._run = run_facts(model, arguments, self.config)
        self._directory = self._record_directory(output_dir)
        self._is_main = is_main if is_main is not None else getattr(accelerator, "is_main_process", True)
        self._started = time.monotonic()
        self._record: RecordWriter | None = None
        self._is_open = True
        self._window = _Window()
        self._read_layout()

    # One window, from the first backward pass to the optimizer's step

    def owns(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these parameters are the guarded model's."""
        return any(id(parameter) in self._ids for parameter in parameters)

    def micro_batch(self, loss: Tensor | None, *, complete: bool) -> None:
        """Tells of a finished backward pass.

        Args:
            loss: what was back-propagated, a scalar.
            complete: whether this was the window's last one, so that its gradients are final.
        """
        self._window.micro_batches += 1
        if loss is not None:
            loss = loss.detach()
            self._window.loss = loss if self._window.loss is None else self._window.loss + loss
        if complete and self._on_gpu and not self._has_scaler:
            # Queued here, the norms reach the host with the Trainer's own wait for the loss. Under a scaler they are
            # final only after it has unscaled them.
            self._measure()

    def clip(
        self, max_norm: float, parameters: Sequence[nn.Parameter], stock: Callable[[], Tensor | None], *, always: bool
    ) -> Tensor | None:
        """Takes the reading, decides, and clips as the Trainer would.

        Args:
            max_norm: the limit; infinity where only the norm is wanted.
            parameters: what the Trainer clips.
            stock: what the Trainer would have called.
            always: call `stock` in every window: others rely on being called.

        Returns:
            The total norm before clipping.
        """
        measurement = self._measure()
        total_norm = None if self._reads_late else self._read().total_norm
        if total_norm is not None and self._window.is_dropped and not always:
            return torch.tensor(total_norm)
        if always or self._window.decision == "observe":
            return stock()
        found, self._window.coefficient = clipping.trainers_own(measurement, parameters, max_norm, total_norm, stock)
        return found

    def before_step(self) -> None:
        """To be called when clipping is done and the optimizer is about to step: a skip takes place here."""
        if self._window.measurement is None and self._has_scaler:  # nobody clipped, so nobody has unscaled
            self._accelerator.unscale_gradients(self._optimizer)
        self._measure()
        if not self._reads_late:
            self._read()
        if self._window.is_dropped:
            drop_gradients(self._everything)
        elif self._wants_weights():
            self._window.probe = WeightProbe(self._tensors, through_fp16=self._has_scaler)

    def after_step(self, *, updated: bool = True) -> None:
        """To be called after the optimizer's step.

        Args:
            updated: False if the optimizer made no update, as under a scaler that met an infinity.
        """
        reading = self._read()
        # The fused AdamW reports no skip: it is called all the same, and told of the infinity.
        skipped_by_scaler = self._has_scaler and bool(reading.nonfinite)
        self._window.updated = updated and not skipped_by_scaler and not self._window.is_dropped
        if self._window.probe is not None and self._window.updated:
            self.weights = self._window.probe.finish()

    def end_window(self) -> None:
        """To be called when the window is over: judges, counts and records it."""
        window, reading = self._window, self._read()
        self.step_number = reading.step
        self.windows += 1
        self.updates += window.updated
        self.clipped += window.coefficient is not None and window.coefficient < 1
        measured = self.weights if window.probe is not None and window.updated else None
        if self._record is not None:
            self._record.window(self._row(reading))
            if measured is not None:
                self._record.weights(reading.step, measured.norms, measured.update_ratios)
        if window.updated and not reading.nonfinite:
            self._pass_judgement(reading, measured)
        self._window = _Window()

    def step(self, loss: Tensor | None = None, num_tokens: int | None = None) -> None:
        """One micro-batch of your own loop, after `accelerator.backward(loss)`: in the last of a window it does what
        `clip_grad_norm_`, `optimizer.step`, `scheduler.step` and `zero_grad` would. `should_stop` becomes True when
        training should end.

        Args:
            loss: what was back-propagated, for the record.
            num_tokens: the number of target tokens in the micro-batch, by which policies weight what they hold back;
                without effect as long as none holds anything back.
        """
        accelerator = self._accelerator
        if self._optimizer is None:
            raise ValueError("guard.step needs the optimizer: GradGuard(model, optimizer, ...)")
        complete = accelerator is None or accelerator.sync_gradients
        if loss is not None and accelerator is not None:
            loss = loss.detach() / accelerator.gradient_accumulation_steps
        self.micro_batch(loss, complete=complete)
        if not complete:
            return
        self.before_step()
        self._optimizer.step()
        self.after_step(updated=not getattr(self._optimizer, "step_was_skipped", False))
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self._optimizer.zero_grad()
        self.end_window()

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
        for name in ("windows", "updates", "skipped", "clipped"):
            found[f"gradguard/{name}"] = getattr(self, name)
        if self.config.log_layers:
            found |= {f"gradguard/layer_{index:03d}/grad_norm": norm for index, norm in enumerate(norms)}
        return found

    def say(self, event: Event) -> None:
        """Adds an event to the list, the record and the log."""
        is_news = event.kind != "healthy" or any(earlier.kind in SEVERITY for earlier in self.events)
        self.events.append(event)
        if self._record is not None:
            self._record.event(event)
        if self._is_main:
            logger.log(
                logging.WARNING if is_news else logging.INFO,
                "GradGuard, update %d: %s: %s",
                event.step,
                event.kind,
                event.message,
            )

    def summary(self) -> str:
        """What came of the run, in a few lines for people."""
        counts = [f"{self.updates} updates"]
        counts += [f"{count} {what}" for what, count in (("clipped", self.clipped), ("skipped", self.skipped)) if count]
        lines = [str(self.verdict), f"Run:     {', '.join(counts)}"]
        if self._record is not None:
            lines.append(f"Record:  {self._directory} (see it with: gradguard report {self._directory.parent})")
        return "GradGuard\n" + "\n".join(lines)

    def flush(self) -> None:
        """Writes to disk what the record still holds in memory."""
        if self._record is not None:
            self._record.flush()

    def close(self, status: str = "finished", message: str = "") -> None:
        """Ends the record; calling it again does nothing.

        Args:
            status: `finished`, `stopped`, `failed` or `interrupted`.
            message: what happened, for the last two.
        """
        if self._is_open and self._record is not None:
            self._record.close("stopped" if self.should_stop and status == "finished" else status, message)
        self._is_open = False

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values."""
        return {
            "judge": self._judge.state_dict(),
            "nonfinite": self._nonfinite.state_dict(),
            "counts": {name: getattr(self, name) for name in ("windows", "updates", "skipped", "clipped")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: it was saved for a model with other layers.
        """
        self._judge.load_state_dict(state["judge"])
        self._nonfinite.load_state_dict(state["nonfinite"])
        for name, value in state["counts"].items():
            setattr(self, name, int(value))

    # Observe

    def _read_layout(self) -> None:
        self.layout, self._tensors = read_layout(self._model)
        if not self._tensors:
            raise ValueError(f"{type(self._model).__name__} has no trainable parameter: every requires_grad is False")
        self._everything = list(self._model.parameters())
        self._ids = {id(parameter) for parameter in self._everything}
        self._trainable = list(map(_REQUIRES_GRAD, self._everything))
        self._on_gpu = any(parameter.is_cuda for parameter in self._tensors)
        self._judge = Judge(stacks_of(self.layout), self.config.thresholds)
        if self._record is not None:
            self._record.close("continued")
        if self.config.record and self._is_main:
            self._record = RecordWriter(
                self._directory,
                self.layout,
                self._run,
                start_step=self.step_number,
                record_every=self.config.record_every,  # type: ignore[arg-type]
                flush_seconds=self.config.flush_seconds,
            )

    def _measure(self) -> Measurement:
        window = self._window
        if window.measurement is None:
            if list(map(_REQUIRES_GRAD, self._everything)) != self._trainable:
                self._read_layout()
            window.measurement = Measurement(self._tensors)
            window.loss_copy = None if window.loss is None else HostCopy(window.loss.double())
        return window.measurement

    def _read(self) -> Reading:
        """Takes delivery of the norms, and decides what to do about this window."""
        window = self._window
        if window.reading is None:
            window.reading = self.reading = Reading(
                step=self.step_number + 1,
                layout=self.layout,
                parameter_norms=self._measure().norms(),
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
    def _reads_late(self) -> bool:
        """Whether the norms are looked at only after the optimizer's step: a scaler skips by itself and waits there."""
        return self._on_gpu and self._has_scaler

    def _learning_rate(self) -> float | None:
        groups = getattr(self._optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups else None

    def _wants_weights(self) -> bool:
        every = self.config.weights_every
        # Underflow takes two probes to be believed; the first window's may have a learning rate of zero.
        return every > 0 and (self.step_number % every == 0 or self.step_number == every // 4)

    # Judge and act

    def _decide(self, reading: Reading) -> None:
        bad = reading.nonfinite
        decision = self._nonfinite.decide(bool(bad))
        if decision == "skip" and self._has_scaler:
            # The scaler looks for its scale by overflowing: it skips the update by itself, and that is no alarm.
            return
        self._window.decision = decision
        if decision is None:
            return
        self.skipped += self._window.is_dropped
        self.should_stop |= decision == "stop"
        self.say(self._nonfinite_event(reading, bad, decision))
        if decision == "stop":
            message = f"training ends: {self.config.nonfinite} allows no further window with non-finite gradients"
            self.say(Event("stopped", reading.step, action="stop", message=message))

    def _nonfinite_event(self, reading: Reading, bad: list[str], action: Decision) -> Event:
        # The backward pass meets the parameters from the last to the first, so that the last is nearest to the origin.
        name = bad[-1]
        index = [info.name for info in self.layout.parameters].index(name)
        value = float(reading.parameter_norms[index])
        others = f" and of {len(bad) - 1} more parameters" if len(bad) > 1 else ""
        done = {
            "skip": "the update was skipped, the weights are as before",
            "stop": "the update was skipped, the weights are as before",
            "observe": "the update goes ahead, as nonfinite='observe' asks",
        }[action]
        return Event(
            kind="nonfinite",
            step=reading.step,
            parameter=name,
            layer=self.layout.groups[self.layout.parameters[index].group].name,
            micro_batch=0 if self._window.micro_batches == 1 else None,
            value=value,
            action=action,
            message=f"the gradient of {name}{others} holds {'NaN' if value != value else 'infinity'}; {done}",
        )

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

    def _row(self, reading: Reading) -> Window:
        return Window(
            step=reading.step,
            loss=reading.loss,
            learning_rate=reading.learning_rate,
            total_norm=reading.total_norm,
            norms=reading.parameter_norms,
            clip_coefficient=self._window.coefficient,
            updated=self._window.updated,
            seconds=time.monotonic() - self._started,
        )

    def _record_directory(self, output_dir: str | Path | None) -> Path:
        if self.config.record_dir is not None:
            return Path(self.config.record_dir)
        return Path(output_dir or getattr(self._accelerator, "project_dir", None) or ".") / "gradguard"


def depth_ratio(norms: Sequence[float]) -> float | None:
    """First layer's norm ÷ last layer's, over the layers that have a gradient; None with fewer than two."""
    seen = [norm for norm in norms if not np.isnan(norm)]
    return seen[0] / seen[-1] if len(seen) > 1 and seen[-1] > 0 else None
