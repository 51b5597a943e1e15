"""A record together with what it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import ROUTINE, Event
from hf_gradguard.judge import (
    SEVERITY,
    DepthProfile,
    History,
    Stack,
    Thresholds,
    Verdict,
    depth_profile,
    judge,
    stacks_of,
)
from hf_gradguard.record.reader import RunRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run as a report sees it: its record, under a name, with the verdict on it."""

    name: str
    record: RunRecord

    @classmethod
    def load(cls, path: str | PathLike[str], name: str | None = None) -> Run:
        """Reads the record of a run, by default named after its output directory.

        Raises:
            RecordError: there is no record at `path`, or it is damaged.
        """
        return cls(name or run_names([path])[0], RunRecord.load(path))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's stacks of layers, the input's first."""
        return stacks_of(self.record.layout)

    @cached_property
    def layer_norms(self) -> Floats:
        """L2 norm of each layer's gradient `[windows, layers]`, NaN where it had none."""
        return self.record.layer_norms

    @cached_property
    def nonfinite(self) -> NDArray[np.bool_]:
        """The windows in which the gradient was not finite `[windows]`."""
        unknown: NDArray[np.bool_] = ~np.isfinite(self.record.total_norms)
        return unknown

    @cached_property
    def thresholds(self) -> Thresholds:
        """Where the guard of this run drew its lines; today's defaults where the record does not say, or says it in a
        way that this version does not know."""
        try:
            return Thresholds(**self.record.run.get("guard", {}).get("thresholds", {}))
        except (TypeError, ValueError):
            return Thresholds()

    def policy(self, option: str) -> str:
        """The policy that the configuration asks for, such as `fixed:windows=4`; empty where it asks for none, and
        where clipping is left to the Trainer."""
        asked = str(self.record.run.get("guard", {}).get(option, "none"))
        return "" if asked in ("none", "trainer") else asked

    @cached_property
    def dry_run(self) -> bool:
        """Whether the policies only said what they would have done."""
        return bool(self.record.run.get("guard", {}).get("dry_run", False))

    @cached_property
    def told(self) -> tuple[Event, ...]:
        """The events to tell one by one: those of routine kinds are summed up instead."""
        return tuple(event for event in self.record.events if event.kind not in ROUTINE)

    @cached_property
    def deferred(self) -> NDArray[np.bool_]:
        """The windows whose gradient was held back for a later update `[windows]`."""
        held: NDArray[np.bool_] = np.isin(
            self.record.steps, [event.step for event in self.record.events if event.action == "hold"]
        )
        return held

    @cached_property
    def unit(self) -> str:
        """What a step of the record is: `update`, or `window` where updates were made of several."""
        return "window" if self.deferred.any() else "update"

    def held(self, values: NDArray[Any]) -> Floats:
        """Numbers on what was held back, one a row of `record.accumulation_steps`, as `[windows]`: NaN in a window
        without one."""
        result = np.full(len(self.record.steps), np.nan)
        _, places, rows = np.intersect1d(self.record.steps, self.record.accumulation_steps, return_indices=True)
        result[places] = values[rows]
        return result

    @cached_property
    def judged(self) -> tuple[Event, ...]:
        """The changes of verdict while the run went on, oldest first."""
        return tuple(event for event in self.record.events if event.kind in SEVERITY)

    @cached_property
    def since(self) -> int | None:
        """The step at which the guard came to the verdict that holds, or None if it came to none."""
        return self.judged[-1].step if self.judged else None

    @cached_property
    def verdict(self) -> Verdict:
        """What the guard said last, with the reasons of the latest updates that show it."""
        now = self._judge(self.record.steps[-1] if len(self.record.steps) else 0)
        if not self.judged:
            return now
        said = self.judged[-1]
        for found in (now, *now.others, *self._findings_at(said.step)):
            if found.kind == said.kind:
                return found
        # What rests on more than gradient norms can't be found again: only the guard's own words are left.
        return Verdict(said.kind, said.message, next=_NEXT.get(said.kind, ""), value=said.value, layer=said.layer)

    @cached_property
    def profiles(self) -> tuple[tuple[Stack, DepthProfile], ...]:
        """How the gradient is spread over each stack in the last updates that a judgement looks at."""
        recent = self.layer_norms[self._finite()][-self.thresholds.window :]
        return tuple((stack, depth_profile(recent[:, list(stack.columns)])) for stack in self.stacks if len(recent))

    def ratio(self, stack: Stack) -> Floats:
        """Norm of the stack's first layer with a gradient ÷ that of its last one, `[windows]`; NaN where unknown."""
        norms = self.layer_norms[:, list(stack.columns)]
        trained = np.flatnonzero(np.nanmax(np.nan_to_num(norms, nan=-1.0, posinf=-1.0), axis=0, initial=-1.0) > 0)
        if len(trained) < 2:
            return np.full(len(norms), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: Floats = norms[:, trained[0]] / norms[:, trained[-1]]
        return ratio

    def _findings_at(self, step: int) -> tuple[Verdict, ...]:
        found = self._judge(step)
        return (found, *found.others)

    def _judge(self, last_step: int) -> Verdict:
        history = History(len(self.record.layers), window=self.thresholds.window)
        chosen = self._finite() & (self.record.steps <= last_step)
        for norms, total in zip(self.layer_norms[chosen], self.record.total_norms[chosen], strict=True):
            history.add(norms, float(total))
        return judge(history, self.stacks, self.thresholds)

    def _finite(self) -> NDArray[np.bool_]:
        used = self.record.updated | self.deferred
        finite: NDArray[np.bool_] = used & ~self.nonfinite & ~np.isinf(self.layer_norms).any(axis=1)
        return finite


_NEXT = {
    "underflow": "Keep the weights in float32 and train with bf16=True, so that neither gradients nor updates are lost "
    "to rounding."
}


def run_names(paths: Sequence[str | PathLike[str]]) -> list[str]:
    """The shortest names that tell runs apart: the ends of their paths, without the `gradguard` that all have."""
    parts = [_parts(Path(path)) for path in paths]
    longest = max((len(names) for names in parts), default=0)
    for depth in range(1, longest + 1):
        names = ["/".join(pieces[-depth:]) for pieces in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(pieces[-1:])} ({number})" for number, pieces in enumerate(parts, start=1)]


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.resolve().parts[1:]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "gradguard" else parts
