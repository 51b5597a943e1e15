"""The figures of a report. Each shows one question; the same drawing serves the page and the picture."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from hf_gradguard.events import Event
from hf_gradguard.judge import SEVERITY
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.report.reduce import Cells, cells, curve
from hf_gradguard.report.runs import Run

Floats = NDArray[np.float64]

HEAT_ROWS, HEAT_COLUMNS = 300, 250
"""Most blocks of updates and of layers in a heat map: about what a screen can show."""
FRAMES = 60
"""Positions of the slider."""
POINTS = 600
"""Most points of a line."""
DOTTED = 150
"""Most points of a figure that are marked, where they lie apart."""
MARKED = 200
"""Most events that are marked in a figure."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SERIOUSNESS = {"exploding": "#c0362c", "vanishing": "#c0362c", "underflow": "#b26200", "dead": "#b26200",
               "healthy": "#1b7f4d", "unknown": "#5f6b7a"}  # fmt: skip
"""Colour of each verdict."""
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, safe for all eyes
_AGES = ("#b4bcc7", "#a3cfec", "#5aa9dd", _HUES[0])
"""Of curves at several moments of one run, from its start to the latest."""
_STATES = {"no gradient": "#dfe3e8", "exactly zero": "#D55E00", "NaN or infinite": "#CC79A7"}
_PROFILE_HEIGHT = 260
_INK, _QUIET, _LINE = "#1f2933", "#5f6b7a", "#e3e7ec"
_LABEL = (
    "datum.value >= 0.001 && datum.value < 10000 ? format(datum.value, '~g') "
    ": replace(format(datum.value, '~e'), '+', '')"
)
"""How numbers on logarithmic axes are written: 0.01, 1e-6."""
_OVERLAP = 0.4
"""Share of its size by which a cell reaches under the one drawn after it: exact edges leave hairlines between them."""
_DECADES = 3
"""The least that the colours of a heat map span: what differs less than that in all looks even, as it is."""
_EVENT_HUES = ("#CC79A7", "#E69F00", "#56B4E9", "#0072B2")
_ACTS = ("nonfinite", "spike", "skipped", "rewound", "discarded", "stopped", "warning")


@dataclass(frozen=True)
class _Line:
    """A threshold, drawn as a dashed line."""

    at: float
    note: str
    """What it means."""
    always: bool = False
    """Whether it is drawn also where the curves stay above it."""


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
    figures = _depth_figures([run]) if run.record.layers else []
    figures += [_loss_figure([run]), _norm_figure(run), _batch_figure(run), _clip_figure(run)]
    if any(len(stack.layers) > 1 for stack in run.stacks):
        figures.append(_ratio_figure([run]))
    if len(run.record.weight_steps) and run.record.layers:
        figures.append(_update_figure(run))
    figures.append(_reach_over_time(run))
    return [figure for figure in figures if figure.panels]


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that lay runs over one another, or side by side where they can't share a plane."""
    runs = [run for run in runs if len(run.record.steps)]
    if not runs:
        return []
    layered = [run for run in runs if run.record.layers]
    figures = [_loss_figure(runs), _ratio_figure(layered), *reversed(_depth_figures(layered))]
    latest = {run.name: list(run.record.time_profiles.values())[-1] for run in runs if run.record.time_profiles}
    figures.append(reach_figure({"": latest}))
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
        "legend": {**text, "orient": "top", "direction": "horizontal", "offset": 8, "titleLimit": 400,
                   "labelLimit": 260},
        "header": text,
        "title": {"anchor": "start", "frame": "group", "fontSize": 14, "fontWeight": 600, "color": _INK,
                  "subtitleColor": _QUIET, "subtitleFontSize": 12, "offset": 12},
    }  # fmt: skip


# Which layers starve, since when


def _depth_figures(runs: Sequence[Run]) -> list[Figure]:
    """Layers over time, and one moment after another."""
    reduced = [
        cells(
            run.record.steps, run.layer_norms, run.nonfinite, run.stacks, max(1, HEAT_ROWS // len(runs)), HEAT_COLUMNS
        )
        for run in runs
    ]
    return [_heat_figure(runs, reduced), _profile_figure(runs, reduced)]


def _heat_figure(runs: Sequence[Run], reduced: Sequence[Cells]) -> Figure:
    domain = _log_domain([summary.norms for summary in reduced], outliers=1e-3)
    height = min(340, max(150, 14 * max((len(run.record.layers) for run in runs), default=0)))
    panels = [
        Panel(run.name if len(runs) > 1 else "", _heat_map(run, summary, domain).properties(height=height))
        for run, summary in zip(runs, reduced, strict=True)
    ]
    return Figure(
        "Which layers starve, and since when?",
        f"Gradient norm of every layer at every {_unit(runs)}, before clipping: dark is little. The input is at the "
        "bottom, the output at the top.",
        tuple(panels),
    )


def _heat_map(run: Run, summary: Cells, domain: tuple[float, float]) -> alt.LayerChart:
    rows, columns, table = _updates_table(summary), _layers_table(run, summary), list(_heat_rows(summary))
    heat = (
        alt.Chart(_data(("row", "column", "norm", "state"), table))
        .transform_lookup("row", alt.LookupData(rows, "row", ["left", "right", "updates"]))
        .transform_lookup("column", alt.LookupData(columns, "column", ["bottom", "top", "layer"]))
        .mark_rect(clip=True)
        .encode(
            x=_step_axis([run], "left"),
            x2="right:Q",
            y=_depth_axis(alt.Y, run, "bottom"),
            y2="top:Q",
            color=_heat_color(domain),
            tooltip=["layer:N", _span_tooltip([run]), *_norm_tooltips()],
        )
    )
    key = _state_key([state for state in _STATES if any(row[-1] == state for row in table)])
    layers = [heat, *key, *_stack_borders(run), *_verdict_line(run)]
    return alt.layer(*layers).resolve_scale(color="independent")


def _heat_rows(summary: Cells) -> Iterable[tuple[Any, ...]]:
    for column, norms in enumerate(summary.norms.T.tolist()):
        for row, norm in enumerate(norms):
            yield row, column, *_norm_or_state(norm)


def _updates_table(summary: Cells) -> alt.InlineData:
    rows = []
    for row in range(len(summary.first_step)):
        first, last = _steps(summary, row)
        following = last + 1 if row + 1 == len(summary.first_step) else int(summary.first_step[row + 1])
        rows.append((row, first - 0.5, following - 0.5 + _OVERLAP * (following - first), _span(first, last)))
    return _data(("row", "left", "right", "updates"), rows)


def _layers_table(run: Run, summary: Cells) -> alt.InlineData:
    rows = [
        (column, members[0] - 0.5, members[-1] + 0.5 + _OVERLAP * len(members), _layer_names(run, members))
        for column, members in enumerate(summary.layers)
    ]
    return _data(("column", "bottom", "top", "layer"), rows)


def _norm_or_state(norm: float) -> tuple[str, str]:
    if norm > 0 and norm != math.inf:
        return f"{norm:.5g}", ""
    return "", "exactly zero" if norm == 0 else "NaN or infinite" if norm == math.inf else "no gradient"


def _heat_color(domain: tuple[float, float]) -> alt.Color:
    legend = alt.Legend(
        values=_log_ticks(*domain, 5), labelExpr=_LABEL, gradientLength=220, gradientThickness=10, offset=24
    )
    scale = alt.Scale(type="log", domain=list(domain), scheme="viridis", clamp=True, nice=False)
    states = [{"test": f"datum.state === '{state}'", "value": hue} for state, hue in _STATES.items()]
    return alt.Color("norm:Q", scale=scale, title="gradient norm", legend=legend, condition=states)


def _state_key(present: Sequence[str]) -> list[alt.Chart]:
    """A legend for the cells that hold no number."""
    if not present:
        return []
    scale = alt.Scale(domain=list(present), range=[_STATES[state] for state in present])
    legend = alt.Legend(symbolOpacity=1, symbolType="square", title=None, offset=24)
    marks = alt.Chart(_data(("state",), [(state,) for state in present])).mark_point(opacity=0, filled=True)
    return [marks.encode(color=alt.Color("state:N", scale=scale, legend=legend))]


def _stack_borders(run: Run) -> list[alt.Chart]:
    borders = [(stack.columns[0] - 0.5,) for stack in run.stacks[1:]]
    rule = alt.Chart(_data(("at",), borders)).mark_rule(color="white", strokeWidth=2)
    return [rule.encode(y="at:Q")] if borders else []


def _verdict_line(run: Run) -> list[alt.Chart]:
    """Where the guard came to the verdict that holds, unless it is that all is well."""
    if run.since is None or run.verdict.kind in ("healthy", "unknown"):
        return []
    at_right = run.since > run.record.steps.mean()
    base = alt.Chart(_data(("at", "label"), [(run.since, f"{run.verdict.kind} since {run.unit} {run.since}")]))
    label = base.mark_text(align="right" if at_right else "left", baseline="bottom", color=_INK, fontSize=12)
    return [
        base.mark_rule(color="white", strokeWidth=1.5, strokeDash=[5, 4]).encode(x="at:Q"),
        label.encode(x="at:Q", y=alt.value(-4), text="label:N"),
    ]


def _profile_figure(runs: Sequence[Run], reduced: Sequence[Cells]) -> Figure:
    domain = _log_domain([summary.norms for summary in reduced])
    alone = len(runs) == 1
    panels = [
        Panel("" if alone else run.name, _profile(run, summary, domain, slider=alone))
        for run, summary in zip(runs, reduced, strict=True)
    ]
    latest = f"{_unit(runs)}s"
    move = " Move the slider to see how that came about." if alone and len(reduced[0].first_step) > 1 else ""
    gaps = any(not np.all((summary.norms > 0) & np.isfinite(summary.norms)) for summary in reduced)
    crosses = " Crosses at the bottom are layers whose gradient is missing, exactly zero or not finite." if gaps else ""
    return Figure(
        "Does the gradient reach the first layer?",
        f"Gradient norm of each layer: blue in the latest {latest}, grey at the start of the record.{move}{crosses}",
        tuple(panels),
    )


def _profile(run: Run, summary: Cells, domain: tuple[float, float], *, slider: bool) -> alt.LayerChart:
    frames = _even(len(summary.first_step), FRAMES if slider else 2)
    last = len(frames) - 1
    table = [(frame, *cell) for frame, row in enumerate(frames) for cell in _profile_rows(run, summary, row)]
    fields = ("frame", "depth", "layer", "updates", "norm", "state", "piece")
    base = alt.Chart(_data(fields, table)).encode(
        x=_depth_axis(alt.X, run, "depth"),
        tooltip=["layer:N", _span_tooltip([run]), *_norm_tooltips()],
    )
    curves = base.transform_filter("datum.norm > 0").encode(y=_number_axis("norm", "gradient norm", domain))
    start = curves.transform_filter("datum.frame == 0").mark_line(color="#b4bcc7", strokeWidth=1.5)
    chosen: Any = f"datum.frame == {last}"
    if slider and last:
        bind = alt.binding_range(min=0, max=last, step=1, name="time")
        start = start.add_params(alt.param(name="frame", value=last, bind=bind))
        chosen = "datum.frame == frame"
    now = curves.transform_filter(chosen).mark_line(
        color=_HUES[0], strokeWidth=2.5, point={"size": 22, "color": _HUES[0]}
    )
    without = base.transform_filter(f"datum.state && {chosen}").mark_point(
        shape="cross", filled=True, size=70, opacity=1
    )
    colors = alt.Scale(domain=list(_STATES), range=list(_STATES.values()))
    layers = [
        start.encode(detail="piece:N"),
        now.encode(detail="piece:N"),
        without.encode(y=alt.value(_PROFILE_HEIGHT - 8), color=alt.Color("state:N", scale=colors, legend=None)),
        _frame_label(run, summary, frames, chosen),
    ]
    return alt.layer(*layers).properties(height=_PROFILE_HEIGHT)


def _profile_rows(run: Run, summary: Cells, row: int) -> Iterable[tuple[Any, ...]]:
    """A line breaks where a layer has no norm, and between stacks: each unbroken piece has a number."""
    layout, span, piece = run.record.layout, _span(*_steps(summary, row)), 0
    stacks = [layout.groups[layout.layers[members[0]]].stack for members in summary.layers]
    for place, members in enumerate(summary.layers):
        norm, state = _norm_or_state(float(summary.norms[row, place]))
        piece += bool(state) or (place > 0 and stacks[place] != stacks[place - 1])
        yield (members[0] + members[-1]) / 2, _layer_names(run, members), span, norm, state, piece


def _even(count: int, most: int) -> list[int]:
    """At most so many of `count` places, at even distances, the first and the last among them."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def _frame_label(run: Run, summary: Cells, frames: Sequence[int], chosen: str) -> alt.Chart:
    """Which updates the slider shows."""
    spans = [(frame, _named_span(run, *_steps(summary, row))) for frame, row in enumerate(frames)]
    label = alt.Chart(_data(("frame", "label"), spans)).transform_filter(chosen)
    label = label.mark_text(align="left", baseline="bottom", fontSize=13, fontWeight=600, color=_HUES[0])
    return label.encode(x=alt.value(0), y=alt.value(-6), text="label:N")


def _steps(summary: Cells, row: int) -> tuple[int, int]:
    return int(summary.first_step[row]), int(summary.last_step[row])


# Numbers over time


def _loss_figure(runs: Sequence[Run]) -> Figure:
    series = [(run.name, run, run.record.losses) for run in runs]
    return _time_figure("Does the loss fall?", f"Loss of each {_unit(runs)}", "loss", series, log=False, events=True)


def _norm_figure(run: Run) -> Figure:
    record = run.record
    series = [(run.name, run, record.total_norms)]
    note = "L2 norm of the whole gradient, before clipping"
    line = None
    if len(record.accumulation_steps):
        used = np.where(record.accumulation_updated, record.accumulated_norms, np.nan)
        series = [("window", run, record.total_norms), ("accumulated", run, run.held(used))]
        line = _threshold(run)
        note += f", of each window and accumulated at each update{_if_dry(run)}"
    title, apart = "How large is the gradient as a whole?", len(series) > 1
    return _time_figure(title, note, "gradient norm", series, log=True, events=True, line=line, apart=apart)


def _threshold(run: Run) -> _Line | None:
    """What the norm of the accumulated gradient has to reach for an update, where the policy goes by that."""
    found = re.fullmatch(r"norm_threshold:(?:.*,)?threshold=([^,]+).*", run.policy("accumulate"))
    if found is None:
        return None
    threshold = float(found[1])
    return _Line(threshold, f"an update is made when the accumulated one reaches the dashed line, {threshold:g}", True)


def _batch_figure(run: Run) -> Figure:
    record = run.record
    used = np.where(record.accumulation_updated, record.held_weights, np.nan)
    series = [("batch of each update", run, run.held(used)), ("noise scale", run, run.held(record.noise_scales))]
    known = [one for one in series if np.isfinite(one[2]).any()]
    note = (
        "Target tokens that an update was made of (micro-batches where there are no labels), and the gradient noise "
        "scale in the same unit: a batch far above it hardly makes the gradient any better, one far below is mostly "
        f"noise{_if_dry(run)}"
    )
    return _time_figure("How large is the batch of an update?", note, "batch size", known, log=True, apart=True)


def _if_dry(run: Run) -> str:
    return "; the accumulation is what the policy would have made" if run.dry_run else ""


def _clip_figure(run: Run) -> Figure:
    """The factor of a rule of the guard; the Trainer's own clipping follows from the norm and its limit."""
    factors = run.record.clip_coefficients
    if run.dry_run or not run.policy("clip") or not (factors < 1).any():
        return Figure("", "", ())
    note = (
        f"What clip={run.policy('clip')} multiplied the gradient with: 1 where nothing was clipped, the smallest "
        "factor where parts are clipped by themselves"
    )
    series = [(run.name, run, factors)]
    return _time_figure("How much does clipping take away?", note, "factor", series, log=True, apart=True)


def _ratio_figure(runs: Sequence[Run]) -> Figure:
    series = [
        (" · ".join(part for part in (run.name if len(runs) > 1 else "", stack.name) if part), run, run.ratio(stack))
        for run in runs
        for stack in run.stacks
        if len(stack.layers) > 1
    ]
    return _time_figure(
        "How much of it reaches the first layer?",
        "Gradient norm of the first layer ÷ that of the last one; 1 is even",
        "first ÷ last layer",
        series,
        log=True,
        line=_vanishing_line(runs),
    )


def _vanishing_line(runs: Sequence[Run]) -> _Line | None:
    at = max((run.thresholds.vanishing for run in runs), default=None)
    return None if at is None else _Line(at, f"below the dashed line, {at:g}, it counts as vanishing")


def _update_figure(run: Run) -> Figure:
    columns = [index for index in run.record.layout.layers if np.isfinite(run.record.update_ratios[:, index]).any()]
    picked = dict.fromkeys((columns[-1], columns[len(columns) // 2], columns[0]) if columns else ())
    table = [
        (step, f"{ratio:.6g}", run.record.layout.groups[column].name)
        for column in picked
        for step, ratio in zip(
            run.record.weight_steps.tolist(), run.record.update_ratios[:, column].tolist(), strict=True
        )
        if ratio > 0 and math.isfinite(ratio)
    ]
    order = [run.record.layout.groups[column].name for column in picked]
    chart = (
        alt.Chart(_data(("step", "ratio", "layer"), table))
        .mark_line(point={"size": 30}, strokeWidth=2)
        .encode(
            x=_step_axis([run], "step"),
            y=_number_axis(
                "ratio", "update ÷ weight", _log_domain([np.array([float(row[1]) for row in table])], decades=1)
            ),
            color=_series_color("layer", order),
            tooltip=["layer:N", "step:Q", alt.Tooltip("ratio:Q", format=".3~g")],
        )
    )
    return Figure(
        "How far does one update move the weights?",
        "Norm of the update ÷ norm of the weights, of the last layer, the one in the middle and the first.",
        (Panel("", alt.layer(chart).properties(height=200)),) if table else (),
    )


def _time_figure(
    title: str,
    note: str,
    axis: str,
    series: Sequence[tuple[str, Run, Floats]],
    *,
    log: bool,
    events: bool = False,
    line: _Line | None = None,
    apart: bool = False,
) -> Figure:
    """Curves over updates, and a threshold. Events are marked where the curves are of one run, for else they could not
    be told apart. Points that lie `apart`, as those of updates made of several windows, are marked while they are few.
    """
    table = [row for name, run, values in series for row in _line_rows(name, run, values, log)]
    if not table:
        return Figure(title, note, ())
    runs = list({id(run): run for _, run, _ in series}.values())
    base = alt.Chart(_data(("step", "updates", "series", "value", "low", "high"), table))
    x, color = _step_axis(runs, "step"), _series_color("series", [name for name, _, _ in series])
    drawn = [np.array([float(row[column]) for row in table]) for column in (4, 5)]
    reach = _log_domain([*drawn, np.array([line.at] if line is not None and line.always else [])], decades=1)
    y = _number_axis("value", axis, reach if log else None)
    dotted = len(table) < 3 * len(series) or (apart and len(table) <= DOTTED)
    curves = base.mark_line(strokeWidth=1.8, point={"size": 12} if dotted else False).encode(
        x=x,
        y=y,
        color=color,
        tooltip=[
            "series:N",
            _span_tooltip(runs),
            *(alt.Tooltip(f"{key}:Q", format=".4~g") for key in ("value", "low", "high")),
        ],
    )
    layers: list[alt.Chart] = [curves]
    if any(row[4] != row[5] for row in table):
        note += f"; each point is the median of several {_unit(runs)}s, the band their range"
        band = base.mark_area(opacity=0.18).encode(x=x, y="low:Q", y2="high:Q", color=color.legend(None))
        layers.insert(0, band)
    if line is not None and (line.always or reach[0] < line.at):
        note += f"; {line.note}"
        layers.append(alt.Chart(_data(("at",), [(line.at,)])).mark_rule(color=_INK, strokeDash=[5, 4]).encode(y="at:Q"))
    if events and len(runs) == 1 and (marks := _event_marks(runs[0])):
        note += "; flags are events: point at one to read it"
        layers += marks
    chart = alt.layer(*layers).resolve_scale(color="independent").properties(height=220)
    return Figure(title, note + ".", (Panel("", chart),))


def _line_rows(name: str, run: Run, values: Floats, log: bool) -> Iterable[tuple[Any, ...]]:
    shown = np.where(values > 0, values, np.nan) if log else values
    line = curve(run.record.steps, shown, POINTS)
    for first, last, middle, low, high in zip(
        line.first_step.tolist(), line.last_step.tolist(), line.middle.tolist(), line.low.tolist(), line.high.tolist(),
        strict=True,
    ):  # fmt: skip
        if not math.isnan(middle):
            yield (first + last) / 2, _span(first, last), name, f"{middle:.6g}", f"{low:.6g}", f"{high:.6g}"


def _event_marks(run: Run) -> list[alt.Chart]:
    table = [
        (max(event.step, int(run.record.steps[0])), event.kind, event.step, event.message)
        for event in notable([event for event in run.told if event.kind != "notice"], MARKED)
    ]
    if not table:
        return []
    kinds = sorted({row[1] for row in table}, key=lambda kind: (_rank(kind), kind))
    hues = [SERIOUSNESS.get(kind, _EVENT_HUES[number % len(_EVENT_HUES)]) for number, kind in enumerate(kinds)]
    base = alt.Chart(_data(("at", "event", "step", "message"), table)).encode(
        x="at:Q",
        color=alt.Color("event:N", scale=alt.Scale(domain=kinds, range=hues), legend=alt.Legend(title=None)),
        tooltip=["event:N", "step:Q", "message:N"],
    )
    flag = base.mark_point(shape="triangle-down", filled=True, size=90, opacity=1).encode(y=alt.value(4))
    rule = alt.Chart(_data(("at",), sorted({row[:1] for row in table}))).mark_rule(color=_QUIET, opacity=0.45)
    return [rule.encode(x="at:Q"), flag]


def notable(events: Sequence[Event], limit: int) -> list[Event]:
    """At most `limit` events in the order of time: verdicts first, then what was acted on, then the rest; where not all
    of a sort fit, some at even distances."""
    chosen: list[int] = []
    for rank in range(3):
        of_rank = [index for index, event in enumerate(events) if _rank(event.kind) == rank]
        chosen += [of_rank[place] for place in _even(len(of_rank), limit - len(chosen))]
    return [events[index] for index in sorted(chosen)]


def _rank(kind: str) -> int:
    return 0 if kind in SEVERITY else 1 if kind in _ACTS else 2


# How far back in time


def _reach_over_time(run: Run) -> Figure:
    """The first and the latest time profile, and up to two between them."""
    steps = list(run.record.time_profiles)
    chosen = [steps[place] for place in _even(len(steps), len(_AGES))] if steps else []
    profiles = {_named_span(run, step, step): run.record.time_profiles[step] for step in chosen}
    hues = [_AGES[-1 - place] for place in _even(len(_AGES), len(chosen))][::-1]
    figure = reach_figure({"": profiles}, hues=hues, banded=list(profiles)[-1:])
    if not figure.panels:
        return figure
    latest = list(profiles)[-1]
    told = f"{profiles[latest].describe()} That is {latest}, of whose samples the band holds 80 %."
    return replace(figure, note=f"{told} {figure.note}")


def reach_figure(
    panels: Mapping[str, Mapping[str, TimeProfile]],
    *,
    hues: Sequence[str] = _HUES,
    banded: Collection[str] = (),
) -> Figure:
    """Time profiles over one another, each as shares of its own norm at lag 0.

    Args:
        panels: for each drawing, by what tells it from its neighbours, the profiles by their names.
        hues: colour of each name, in the order in which they come first.
        banded: the names whose spread is drawn as well, from 10 % of the samples to 90 %.
    """
    tables = {label: list(_reach_rows(profiles)) for label, profiles in panels.items()}
    tables = {label: table for label, table in tables.items() if table}
    shares = np.array([float(row[2]) for table in tables.values() for row in table])
    domain = _log_domain([shares], decades=1)
    names = list(dict.fromkeys(row[1] for table in tables.values() for row in table))
    return Figure(
        "How far back in time does the gradient reach?",
        "Norm of the gradient of the loss at one token with respect to the input so many tokens before, as a share of "
        "what it is with respect to the token itself; geometric mean over rows and places in them.",
        tuple(Panel(label, _reach(table, domain, names, hues, banded)) for label, table in tables.items()),
    )


def _reach(
    table: Sequence[Sequence[Any]],
    domain: tuple[float, float],
    names: Sequence[str],
    hues: Sequence[str],
    banded: Collection[str],
) -> alt.LayerChart:
    fields = ("lag", "series", "share", "low", "high", "piece", "norm", "samples")
    base = alt.Chart(_data(fields, table))
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    x = alt.X("lag:Q", title="tokens back", axis=axis, scale=alt.Scale(nice=False))
    y, color = _number_axis("share", "share of the gradient at lag 0", domain), _series_color("series", names, hues)
    tooltip = [
        "series:N", alt.Tooltip("lag:Q", title="tokens back"),
        *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("share", "low", "high", "norm")), "samples:Q",
    ]  # fmt: skip
    line = base.mark_line(strokeWidth=2).encode(x=x, y=y, color=color, detail="piece:N", tooltip=tooltip)
    area = base.transform_filter(f"indexof({json.dumps(list(banded))}, datum.series) >= 0")
    band = area.mark_area(opacity=0.15, clip=True).encode(
        x=x, y="low:Q", y2="high:Q", color=color.legend(None), detail="piece:N"
    )
    layers = [band, line] if any(row[1] in banded for row in table) else [line]
    return alt.layer(*layers).resolve_scale(color="independent").properties(height=_PROFILE_HEIGHT)


def _reach_rows(profiles: Mapping[str, TimeProfile]) -> Iterable[tuple[Any, ...]]:
    """A line breaks where nothing of the gradient is left: each unbroken piece has a number."""
    for name, profile in profiles.items():
        piece = 0
        bounds = np.clip(profile.quantiles[:, [0, -1]] / (profile.mean[0] or np.nan), 1e-300, 1e300)
        for lag in _even(len(profile.lags), POINTS):
            share = float(profile.relative[lag])
            if not (share > 0 and math.isfinite(share)):
                piece += 1
                continue
            low, high = (f"{bound:.5g}" for bound in bounds[lag].tolist())
            yield lag, name, f"{share:.5g}", low, high, piece, f"{profile.mean[lag]:.5g}", int(profile.samples[lag])


# Axes and data


def _unit(runs: Sequence[Run]) -> str:
    """What a step on the axis is: `update`, or `window` where some run made its updates of several."""
    return "window" if any(run.unit == "window" for run in runs) else "update"


def _span_tooltip(runs: Sequence[Run]) -> Any:
    return "updates:N" if _unit(runs) == "update" else alt.Tooltip("updates:N", title="windows")


def _norm_tooltips() -> list[alt.Tooltip]:
    return [alt.Tooltip("norm:Q", format=".3~g"), alt.Tooltip("state:N", title=" ")]


def _step_axis(runs: Sequence[Run], field: str) -> alt.X:
    steps = [run.record.steps for run in runs]
    ends = [min(int(each[0]) for each in steps) - 0.5, max(int(each[-1]) for each in steps) + 0.5]
    axis = alt.Axis(tickMinStep=1, format="d", grid=False, tickCount=8)
    return alt.X(f"{field}:Q", title=_unit(runs), axis=axis, scale=alt.Scale(domain=ends, nice=False))


def _depth_axis(channel: Any, run: Run, field: str) -> Any:
    """The axis of all layers, stack after stack, with the input at its beginning."""
    ticks = _depth_ticks(run)
    axis = alt.Axis(values=list(ticks), labelExpr=f"{json.dumps(ticks)}[datum.value]", grid=False)
    scale = alt.Scale(domain=[-0.5, len(run.record.layers) - 0.5], nice=False)
    return channel(f"{field}:Q", title="layer, from input to output", axis=axis, scale=scale)


def _depth_ticks(run: Run) -> dict[int, str]:
    """Layers that are named on an axis, at most a dozen or so, by their places."""
    step = next(size for size in _tick_steps() if len(run.record.layers) <= 12 * size)
    groups = [run.record.layout.groups[index] for index in run.record.layout.layers]
    return {
        column: f"{groups[column].stack} {groups[column].depth}".strip()
        for stack in run.stacks
        for column in stack.columns
        if (groups[column].depth or 0) % step == 0
    }


def _tick_steps() -> Iterable[int]:
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10


def _number_axis(field: str, title: str, domain: tuple[float, float] | None = None) -> alt.Y:
    """A linear axis, or a logarithmic one over `domain`."""
    if domain is None:
        return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    room = (domain[1] / domain[0]) ** 0.04
    scale = alt.Scale(type="log", domain=[domain[0] / room, domain[1] * room], nice=False)
    axis = alt.Axis(values=_log_ticks(*domain, 7), labelExpr=_LABEL)
    return alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers to label a logarithmic axis with: powers of ten, and 2 and 5 times these where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, -(-(last - first) // most))
    ticks = [10.0**power for power in range(-(-last // step) * step, first - 1, -step)]
    if last - first <= 2:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _series_color(field: str, names: Sequence[str], hues: Sequence[str] = _HUES) -> alt.Color:
    names = list(dict.fromkeys(names))
    hues = [hues[number % len(hues)] for number in range(len(names))]
    columns = 3 if len(names) > 4 else len(names)  # in one row, many names would be wider than the plot
    legend = alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=3, columns=columns)
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=hues), legend=legend if len(names) > 1 else None)


def _log_domain(tables: Sequence[Floats], *, outliers: float = 0.0, decades: int = _DECADES) -> tuple[float, float]:
    """The range of what is above zero.

    Args:
        tables: the numbers to be drawn.
        outliers: share of them, at either end, that need not be told apart.
        decades: the least that it spans.
    """
    values = np.concatenate([table[(table > 0) & np.isfinite(table)] for table in tables] or [np.empty(0)])
    if not len(values):
        return 10.0**-decades, 1.0
    low, high = np.quantile(values, (outliers, 1 - outliers), method="nearest")
    return float(min(low, high * 10.0**-decades)), float(high)


def _layer_names(run: Run, members: Sequence[int]) -> str:
    names = run.record.layers
    return names[members[0]] if len(members) == 1 else f"{names[members[0]]} to {names[members[-1]]}"


def _named_span(run: Run, first: int, last: int) -> str:
    return f"{run.unit}{'s' if last > first else ''} {_span(first, last)}"


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _data(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> alt.InlineData:
    """A table as CSV: a third of the size of the same as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type="csv"))
