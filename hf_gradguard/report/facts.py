"""What there is to say about a run in a few words."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np

from hf_gradguard.report.runs import Run

_HEADLINES = {
    "healthy": "Healthy",
    "vanishing": "Vanishing gradient",
    "exploding": "Exploding gradient",
    "dead": "Dead layers",
    "underflow": "Lost to rounding",
    "unknown": "Too early to say",
}


def headline(run: Run) -> str:
    """The verdict in two words, and since when it holds."""
    name = _HEADLINES[run.verdict.kind]
    return name if run.since is None else f"{name} since {run.unit} {run.since:,}"


def status_line(run: Run) -> str:
    """How the run ended, or that it has not."""
    status = {"running or killed": "still running, or killed"}.get(run.record.status, run.record.status)
    reached = f"{_updates(run):,} updates" if len(run.record.steps) else "no update recorded yet"
    broken = int(np.count_nonzero(run.nonfinite))
    bad = f", {broken:,} window{'s' if broken > 1 else ''} with NaN or infinity" if broken else ""
    attempts = f", {len(run.record.segments)} attempts" if len(run.record.segments) > 1 else ""
    message = f": {run.record.message}" if run.record.message else ""
    return f"{status}, {reached}{bad}{attempts}{message}"


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, as pairs of a name and a value; what is unknown is left out."""
    record = run.record
    model, versions = record.run.get("model", {}), record.run.get("versions", {})
    skipped = int(np.count_nonzero(~record.updated & ~run.deferred))
    clipped = int(np.count_nonzero(record.clip_coefficients < 1))
    several = run.unit == "window"
    steps = _updates(run) if several else len(record.steps)
    found = [
        ("model", model.get("class", "")),
        ("parameters", _count(model.get("parameters"))),
        ("trained", _count(model.get("trainable_parameters")) if _partly_frozen(model) else ""),
        ("layers", " + ".join(f"{len(stack.layers)} {stack.name}".strip() for stack in run.stacks)),
        ("status", record.status),
        ("windows", f"{len(record.steps):,}" if several else ""),
        ("updates", f"{_updates(run):,}"),
        ("skipped windows", f"{skipped:,}" if skipped else ""),
        ("clipped", f"{clipped:,} of {steps:,}" if clipped else ""),
        ("last loss", last_loss(run)),
        ("first ÷ last layer", last_ratio(run)),
        ("precision", ", ".join(model.get("dtypes", []))),
        ("device", record.run.get("device", "")),
        ("started", str(record.run.get("started", "")).replace("T", " ").removesuffix("+00:00")),
        ("time", _duration(run)),
        *((name, str(version)) for name, version in versions.items() if name != "python"),
    ]
    return [(name, value) for name, value in found if value]


def sentence(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def last_loss(run: Run) -> str:
    """Median loss of the latest updates, empty where there is none."""
    known = run.record.losses[-10:][np.isfinite(run.record.losses[-10:])]
    return f"{np.median(known):.4g}" if len(known) else ""


def last_ratio(run: Run) -> str:
    """First-to-last ratio of each stack in the latest updates, empty where there is none."""
    ratios = [
        f"{profile.first_to_last:.2g} {stack.name}".strip()
        for stack, profile in run.profiles
        if math.isfinite(profile.first_to_last)
    ]
    return ", ".join(ratios)


def _updates(run: Run) -> int:
    return int(np.count_nonzero(run.record.updated))


def _partly_frozen(model: dict[str, object]) -> bool:
    return model.get("parameters") != model.get("trainable_parameters")


def _count(number: object) -> str:
    if not isinstance(number, int):
        return ""
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _duration(run: Run) -> str:
    """Time of all attempts together, as far as windows of them were recorded."""
    spent = sum(float(segment.numbers["seconds"][-1]) for segment in run.record.segments if len(segment.steps))
    return str(timedelta(seconds=round(spent))) if math.isfinite(spent) and spent > 0 else ""
