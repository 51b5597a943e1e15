"""What the policies of a run did, summed up; in a dry run, what they would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import Event
from hf_gradguard.report.runs import Run

_ACTIONS = {"deferred": ("hold",), "skipped": ("skip", "stop"), "clipped": ("clip",), "discarded": ("discard",)}
"""What an event says was done, by what became of the window."""
_OPTIONS = {"deferred": "accumulate", "skipped": "nonfinite", "clipped": "clip", "discarded": "accumulate"}
"""The option of the configuration that asks for it."""


@dataclass(frozen=True)
class Intervention:
    """One sort of thing that was done to windows."""

    name: str
    """`deferred`, `skipped`, `clipped` or `discarded`."""
    windows: int
    share: str
    """How much that is, such as `14% of updates`; empty where there are none."""
    policy: str
    """The option that asked for it, such as `clip=zclip`."""
    detail: str
    """What else there is to say, in a few words; may be empty."""


@dataclass(frozen=True)
class Interventions:
    """All that the policies of a run did."""

    dry_run: bool
    """Whether nothing was done, only said."""
    windows: int
    updates: int
    """Steps that the optimizer made; in a dry run, would have made."""
    sizes: str
    """Of how many windows each was made, such as `1 to 8`; empty where of one."""
    sorts: tuple[Intervention, ...]

    def made(self) -> str:
        """How many updates were made of how many windows, as a sentence."""
        sizes = f", of {self.sizes} windows each" if self.sizes else ""
        updates = f"{_plural(self.updates, 'update')} {'would have been' if self.dry_run else 'were'} made{sizes}."
        said = "This was a dry run: nothing was done. " if self.dry_run else ""
        return f"{said}Of {_plural(self.windows, 'window')}, {updates}"

    def line(self) -> str:
        """All of it in one line."""
        windows, updates = _plural(self.windows, "window"), _plural(self.updates, "update")
        if self.dry_run:
            first, *others = [(_count(sort.windows), sort.name) for sort in self.sorts]
            said = [" would have been ".join(first), *map(" ".join, others)]
            return f"of {windows} {', '.join(said)}; {updates} made"
        done = [
            f"{_count(sort.windows)} {sort.name}{f' ({sort.detail})' if sort.detail else ''}" for sort in self.sorts
        ]
        return f"{windows}, {updates}: {', '.join(done)}"


def interventions(run: Run) -> Interventions | None:
    """Sums up what the policies of a run did.

    Args:
        run: the run; it counts what is in the part of it that is recorded.

    Returns:
        The summary, or None where no policy but that on NaN and infinity was on.
    """
    asked = [name for name in ("deferred", "clipped") if run.policy(_OPTIONS[name])]
    done = {name: _events(run, actions) for name, actions in _ACTIONS.items()}
    if not (asked or run.dry_run or done["deferred"] or done["clipped"]):
        return None
    lost = np.isin(run.record.steps, [event.step for name in ("deferred", "skipped") for event in done[name]])
    updates = int(np.count_nonzero(~lost if run.dry_run else run.record.updated))
    shown = [name for name in _ACTIONS if done[name] or name in asked or (name == "skipped" and run.dry_run)]
    sorts = tuple(_intervention(run, name, done[name], updates) for name in shown)
    return Interventions(run.dry_run, len(run.record.steps), updates, _sizes(run), sorts)


def _events(run: Run, actions: Sequence[str]) -> list[Event]:
    """Events of windows whose rows have been written, with one of these actions: done, or in a dry run said."""
    wanted = {f"would {action}" if run.dry_run else action for action in actions}
    known = set(run.record.steps.tolist())
    return [event for event in run.record.events if event.action in wanted and event.step in known]


def _intervention(run: Run, name: str, events: Sequence[Event], updates: int) -> Intervention:
    steps = np.unique([event.step for event in events])
    windows = len(steps)
    share, detail, policy = "", "", run.policy(_OPTIONS[name])
    if name == "discarded":
        windows = int(sum(event.value or 1 for event in events))
    elif name == "clipped":
        share = f"{_share(windows, updates)} of updates"
        detail = _smallest_factor(run, steps)
    else:
        share = f"{_share(windows, len(run.record.steps))} of windows"
    return Intervention(name, windows, share if windows else "", f"{_OPTIONS[name]}={policy}" if policy else "", detail)


def _smallest_factor(run: Run, steps: NDArray[np.int64]) -> str:
    factors = run.record.clip_coefficients[np.isin(run.record.steps, steps)]
    if run.dry_run or not np.isfinite(factors).any():
        return ""
    return f"smallest factor {np.nanmin(factors):.2g}"


def _sizes(run: Run) -> str:
    """Of how many windows updates were made."""
    sizes = run.record.held_windows[run.record.accumulation_updated]
    if not len(sizes) or sizes.max() == 1:
        return ""
    return f"{sizes.max()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"


def _share(count: int, total: int) -> str:
    share = count / total if total else 0.0
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _count(number: int) -> str:
    return f"{number:,}" if number else "none"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"
