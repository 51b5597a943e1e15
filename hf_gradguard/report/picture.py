"""The report as a PNG, drawn without a browser."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from hf_gradguard.report.charts import SERIOUSNESS, Figure, config
from hf_gradguard.report.facts import headline, sentence, status_line
from hf_gradguard.report.interventions import interventions
from hf_gradguard.report.runs import Run

WIDTH = 960
"""Of the plots, in pixels before scaling."""
SCALE = 1.5
"""Pixels of the picture for each one of the drawing."""
_GAP = 70
_ABREAST = 3
"""Most drawings side by side."""


def report_picture(run: Run, figures: Sequence[Figure]) -> bytes:
    """The verdict and all figures of one run, one under another, as PNG."""
    verdict = run.verdict
    reasons = (f"{word}: {text}" for word, text in (("Why", verdict.why), ("Next", verdict.next)) if text)
    lines = [f"{run.name}: {status_line(run)}", sentence(verdict.message), *reasons]
    if (acted := interventions(run)) is not None:
        lines.append(f"{'Dry run' if acted.dry_run else 'Acted'}: {acted.line()}")
    return _draw(headline(run), SERIOUSNESS[verdict.kind], lines, figures)


def comparison_picture(runs: Sequence[Run], figures: Sequence[Figure]) -> bytes:
    """The verdicts and all figures of several runs as PNG."""
    lines = [
        f"{run.name}: {headline(run)}. {sentence(run.verdict.message)} {sentence(run.verdict.why)}" for run in runs
    ]
    return _draw(f"{len(runs)} runs compared", "#1f2933", lines, figures)


def reach_picture(figure: Figure) -> bytes:
    """Time profiles over one another as PNG."""
    return _draw(figure.title, "#1f2933", [figure.note], [replace(figure, title="", note="")])


def _draw(title: str, color: str, lines: Sequence[str], figures: Sequence[Figure]) -> bytes:
    import vl_convert

    wrapped = [piece for line in lines if line for piece in textwrap.wrap(line, 150)]
    rows = [_row(figure) for figure in figures] or [_empty()]
    heading = alt.TitleParams(title, subtitle=wrapped, color=color, fontSize=24, subtitleFontSize=13, offset=24)
    chart = alt.vconcat(*rows, title=heading, spacing=36, padding=24)
    spec: dict[str, Any] = chart.resolve_scale(color="independent").to_dict()
    spec["config"] = config()
    picture: bytes = vl_convert.vegalite_to_png(spec, scale=SCALE, allowed_base_urls=[])
    return picture


def _row(figure: Figure) -> alt.ConcatChart:
    columns = min(len(figure.panels), _ABREAST)
    width = (WIDTH - _GAP * (columns - 1)) // columns
    panels = [
        panel.chart.properties(width=width, title=alt.TitleParams(panel.label, fontSize=12, fontWeight=500))
        if panel.label
        else panel.chart.properties(width=width)
        for panel in figure.panels
    ]
    title = alt.TitleParams(figure.title, subtitle=textwrap.wrap(figure.note, 150))
    return alt.concat(*panels, columns=columns, title=title).resolve_scale(color="independent")


def _empty() -> alt.Chart:
    nothing = alt.Chart(alt.InlineData(values=[{"text": "No window was recorded yet: there is nothing to draw."}]))
    return nothing.mark_text(align="left", fontSize=14).encode(x=alt.value(0), text="text:N").properties(height=40)
