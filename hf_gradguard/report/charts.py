"""The figures of a report. Each shows one question; the same drawing serves the page and the picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from hf_gradguard.events import Event
from hf_gradguard.judge import SEVERITY
from hf_gradguard.report.reduce import Cells, cells, curve
from hf_gradguard.report.runs import Run

HEAT_ROWS, HEAT_COLUMNS = 300, 250
"""Most blocks of updates and of layers in a heat map: about what a screen can show."""
FRAMES = 60
"""Positions of the slider."""
POINTS = 600
"""Most points of a line."""
MARKED = 200
"""Most events that are marked in a figure."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SERIOUSNESS = {"exploding": "#c0362c", "vanishing": "#c0362c", "underflow": "#b26200", "dead": "#b26200",
               "healthy": "#1b7f4d", "unknown": "#5f6b7a"}  # fmt: skip
"""Colour of each verdict."""
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, safe for all eyes
_STATES = {"no gradient": "#dfe3e8", "exactly zero": "#D55E00", "NaN or infinite": "#CC79A7"}
_INK, _QUIET, _LINE = "#1f2933", "#5f6b7a", "#e3e7ec"
_DECADES = 3
"""The least that the colours of a heat map span: what differs less than that in all looks even, as it is."""
_ACTS = ("nonfinite", "spike", "skipped", "rewound", "stopped", "warning")


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure."""

    label: str
    """What tells it from its neighbours; empty where it is alone."""
    chart: alt.LayerChart


@dataclass(frozen=True)
class Figure:
    """One question and the drawings that answer it."""

    title: str
    note: str
    """How to read it."""
    panels: tuple[Panel, ...]


def report_figures(run: Run) -> list[Figure]:
    """The figures of one run, in the order of reading; none for a run without windows."""
    if not len(run.record.steps):
        return []
    figures = [_heat_figure([run]), _profile_figure([run])] if run.record.layers else []
    figures += [_loss_figure([run]), _norm_figure([run])]
    if any(len(stack.layers) > 1 for stack in run.stacks):
        figures.append(_ratio_figure([run]))
    if len(run.record.weight_steps) and run.record.layers:
        figures.append(_update_figure(run))
    return [figure for figure in figures if figure.panels]


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that lay runs over one another, or side by side where they can't share a plane."""
    runs = [run for run in runs if len(run.record.steps)]
    if not runs:
        return []
    layered = [run for run in runs if run.record.layers]
    figures = [_loss_figure(runs), _ratio_figure(layered), _profile_figure(layered), _heat_figure(layered)]
    return [figure for figure in figures if figure.panels]


def config() -> dict[str, Any]:
    """How all figures look."""
    text = {"labelColor": _QUIET, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500}
    return {
        "font": FONT,
        "background": "white",
        "view": {"stroke": None},
        "axis": {**text, "gridColor": _LINE, "domainColor": "#c3cad3", "tickColor": "#c3cad3", "titlePadding": 8,
                 "labelOverlap": True},
        "legend": {**text, "orient": "top", "direction": "horizontal", "offset": 8, "titleLimit": 400, "labelLimit": 260},
        "header": text,
        "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "color": _INK, "subtitleColor": _QUIET,
                  "subtitleFontSize": 12, "offset": 12},
    }  # fmt: skip


# Which layers starve, since when


def _heat_figure(runs: Sequence[Run]) -> Figure:
    reduced = [_cells(run, HEAT_ROWS // len(runs), HEAT_COLUMNS) for run in runs]
    domain = _log_domain([summary.norms for summary in reduced])
    panels = [
        Panel(run.name if len(runs) > 1 else "", _heat_map(run, summary, domain))
        for run, summary in zip(runs, reduced, strict=True)
    ]
    marks = " The dashed line is where the verdict was reached." if any(_line_step(run) for run in runs) else ""
    return Figure(
        "Which layers starve, and since when?",
        "Gradient norm of every layer at every update, before clipping. The input is at the bottom, the output at the "
        f"top; dark is little.{marks}",
        tuple(panels),
    )


def _cells(run: Run, rows: int, columns: int) -> Cells:
    return cells(run.record.steps, run.layer_norms, run.nonfinite, run.stacks, rows, columns)


def _heat_map(run: Run, summary: Cells, domain: tuple[float, float]) -> alt.LayerChart:
    # Each cell reaches into those that are drawn after it: exact edges leave hairlines between cells.
    table = [
        (first - 0.5, last + 0.5 + 0.4 * (last - first + 1 if last < summary.last_step[-1] else 0),
         members[0] - 0.5, members[-1] + 0.5 + (0.4 if members is not summary.layers[-1] else 0),
         _layer_names(run, members), _span(first, last), *_number_or_state(norm))
        for members, column in zip(summary.layers, summary.norms.T.tolist(), strict=True)
        for first, last, norm in zip(summary.first_step.tolist(), summary.last_step.tolist(), column, strict=True)
    ]  # fmt: skip
    names = ("left", "right", "bottom", "top", "layer", "updates", "norm", "state")
    scale = alt.Scale(type="log", domain=list(domain), scheme="viridis", clamp=True, nice=False)
    color: Any = alt.Color("norm:Q", scale=scale, title="gradient norm", legend=_gradient_legend())
    for state, hue in _STATES.items():
        color = _when(f"datum.state === '{state}'", hue, color)
    present = [state for state in _STATES if any(row[-1] == state for row in table)]
    steps = (float(summary.first_step[0]) - 0.5, float(summary.last_step[-1]) + 0.5)
    heat = (
        alt.Chart(_data(names, table))
        .mark_rect(clip=True)
        .encode(
            x=alt.X("left:Q", scale=alt.Scale(domain=list(steps), nice=False), title="update", axis=_step_axis()),
            x2="right:Q",
            y=alt.Y("bottom:Q", scale=_depth_scale(run), title="layer", axis=_depth_axis(run)),
            y2="top:Q",
            color=color,
            tooltip=["layer:N", "updates:N", alt.Tooltip("norm:Q", format=".3~g"), alt.Tooltip("state:N", title=" ")],
        )
    )
    layers = [heat, *_state_legend(present), *_stack_borders(run), *_verdict_lines(run)]
    return alt.layer(*layers).resolve_scale(color="independent").properties(height=_heat_height(run))


def _when(test: str, hue: str, otherwise: Any) -> Any:
    """`otherwise`, but in the colour `hue` where `test` holds."""
    conditions = [*otherwise.to_dict().get("condition", [])] if isinstance(otherwise, alt.ColorValue) else []
    return otherwise if conditions else otherwise


def _gradient_legend() -> alt.Legend:
    return alt.Legend(format="~g", gradientLength=220, gradientThickness=10, tickCount=5)
