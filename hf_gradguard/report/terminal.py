"""A run in a few lines of text."""

from __future__ import annotations

import math
import textwrap

import numpy as np

from hf_gradguard.report.facts import facts, headline, last_loss, last_ratio, status_line
from hf_gradguard.report.interventions import interventions
from hf_gradguard.report.runs import Run

_BAR = 24
_BARS = 8
_COLORS = {"exploding": "31", "vanishing": "31", "underflow": "33", "dead": "33", "healthy": "32", "unknown": "0"}


def terminal_summary(run: Run, *, color: bool = False, width: int = 100) -> str:
    """Verdict, why, next, the depth profile and what policies did in a run, in at most 25 lines.

    Args:
        run: what it is about.
        color: whether the verdict is coloured, by ANSI codes.
        width: of the lines, in characters.
    """
    lines = [
        f"{run.name}: {status_line(run)}",
        *_labelled("Verdict", headline(run) + ": " + run.verdict.message, width),
    ]
    if color:
        lines[1] = f"\033[1;{_COLORS[run.verdict.kind]}m{lines[1]}\033[0m"
    lines += [*_labelled("Why", run.verdict.why, width), *_labelled("Next", run.verdict.next, width)]
    lines += _profiles(run)
    if (acted := interventions(run)) is not None:
        lines += _labelled("Dry run" if acted.dry_run else "Acted", acted.line(), width)
    lines += _labelled("Run", ", ".join(f"{name} {value}" for name, value in _brief(run)), width)
    return "\n".join(lines[:25])


def comparison_summary(runs: list[Run]) -> str:
    """A table of runs and their verdicts, one a line."""
    head = ("run", "verdict", "last loss", "first ÷ last", "status")
    rows = [(run.name, headline(run), last_loss(run) or "–", last_ratio(run) or "–", run.record.status) for run in runs]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def _brief(run: Run) -> list[tuple[str, str]]:
    wanted = ("model", "parameters", "layers", "last loss", "time")
    return [pair for pair in facts(run) if pair[0] in wanted]


def _labelled(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=f"{label:<9}", subsequent_indent=" " * 9) if text else []


def _profiles(run: Run) -> list[str]:
    """Norms of some layers, each stack from the output down, with bars of log length."""
    levels = np.concatenate([profile.levels[profile.alive] for _, profile in run.profiles] or [np.empty(0)])
    if not len(levels):
        return []
    low, top = np.log([min(levels.min(), levels.max() * 1e-3), levels.max()])
    width = max(len(name) for name in run.record.layers)
    lines = []
    for stack, profile in run.profiles:
        for index in _chosen(len(stack.layers), _BARS // len(run.profiles)):
            level = float(profile.levels[index])
            number = "no gradient" if math.isnan(level) else f"{level:.1e}"
            length = max(1, round(_BAR * (math.log(level) - low) / (top - low))) if level > 0 else 0
            lines.append(f"{'':9}{stack.layers[index]:<{width}}  {number:<11}  {'█' * length}".rstrip())
    return lines


def _chosen(layers: int, most: int) -> list[int]:
    """Some layers at even distances, the ends among them, from the output down."""
    places = np.linspace(layers - 1, 0, min(layers, max(2, most)))
    return [round(place) for place in places.tolist()]
