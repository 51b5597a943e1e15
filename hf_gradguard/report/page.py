"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

from hf_gradguard import __version__
from hf_gradguard.report.charts import FONT, SERIOUSNESS, Figure, config, notable
from hf_gradguard.report.facts import facts, headline, sentence, status_line
from hf_gradguard.report.interventions import Intervention, interventions
from hf_gradguard.report.runs import Run

LISTED = 200
"""Most events in the table."""


def plotting_library() -> str:
    """The JavaScript that draws the figures, put together from what is installed with `vl_convert`."""
    import vl_convert

    library: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return library


def report_page(run: Run, figures: Sequence[Figure]) -> str:
    """The page of one run with its figures."""
    body = [_verdict_card(run), _facts(run), *_interventions(run), *_figures(figures), _events(run)]
    return _page(f"GradGuard: {run.name}", run.name, status_line(run), body, figures)


def comparison_page(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """The page that compares runs."""
    title = " · ".join(run.name for run in runs)
    return _page(
        f"GradGuard: {title}", f"{len(runs)} runs compared", title, [_verdict_table(runs), *_figures(figures)], figures
    )


def _page(title: str, heading: str, subheading: str, body: Sequence[str], figures: Sequence[Figure]) -> str:
    specs = [_spec(panel.chart) for figure in figures for panel in figure.panels]
    return _PAGE.substitute(
        title=escape(title),
        heading=escape(heading),
        subheading=escape(subheading),
        font=FONT,
        body="\n".join(body),
        version=escape(__version__),
        library=_in_script(plotting_library()) if specs else "",
        specs=_in_script(json.dumps(specs, separators=(",", ":"))),
    )


def _spec(chart: Any) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(width="container").to_dict()
    spec.pop("$schema", None)
    spec["config"] = config()
    return spec


def _in_script(text: str) -> str:
    """Text that can stand in a script element: nothing in it ends the element."""
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def _verdict_card(run: Run) -> str:
    verdict = run.verdict
    rows = [("Verdict", f"<strong>{escape(headline(run))}</strong><br>{escape(sentence(verdict.message))}")]
    rows += [(word, escape(sentence(text))) for word, text in (("Why", verdict.why), ("Next", verdict.next)) if text]
    rows += [("Also", escape(f"{other.kind}: {other.message} {other.why}")) for other in verdict.others]
    cells = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in rows)
    return f'<section class="verdict" style="--hue:{SERIOUSNESS[verdict.kind]}"><dl>{cells}</dl></section>'


def _facts(run: Run) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(run))
    return f'<section><dl class="facts">{items}</dl></section>'


def _interventions(run: Run) -> list[str]:
    """What the policies did; nothing where none was on."""
    found = interventions(run)
    if found is None:
        return []
    title = "What would the guard have done?" if found.dry_run else "What did the guard do?"
    head = "".join(f"<th>{name}</th>" for name in ("what", "windows", "by"))
    rows = "".join(_intervention(sort) for sort in found.sorts)
    return [
        f"<section><h2>{title}</h2><p>{found.made()}</p><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    ]


def _intervention(sort: Intervention) -> str:
    about = escape("; ".join(part for part in (sort.policy, sort.share, sort.detail) if part))
    breakable = re.sub("([:,])", r"\1<wbr>", about)
    return f"<tr><td>{_badge(sort.name)}</td><td>{sort.windows:,}</td><td>{breakable}</td></tr>"


def _figures(figures: Sequence[Figure]) -> list[str]:
    places = iter(range(sum(len(figure.panels) for figure in figures)))
    sections = []
    for figure in figures:
        panels = "".join(
            f"<figure>{f'<figcaption>{escape(panel.label)}</figcaption>' if panel.label else ''}"
            f'<div class="chart" data-spec="{next(places)}"></div></figure>'
            for panel in figure.panels
        )
        sections.append(
            f"<section><h2>{escape(figure.title)}</h2><p>{escape(figure.note)}</p>"
            f'<div class="panels">{panels}</div></section>'
        )
    return sections


def _events(run: Run) -> str:
    shown = notable(run.told, LISTED)
    if not shown:
        return "<section><h2>What happened?</h2><p>No events were recorded.</p></section>"
    hidden = len(run.told) - len(shown)
    more = f" {hidden:,} more, of lesser weight, are in the record." if hidden else ""
    rows = "".join(
        f'<tr><td class="number">{event.step:,}</td><td>{_badge(event.kind)}</td>'
        f"<td>{escape(event.parameter or event.layer or '')}</td><td>{escape(sentence(event.message))}</td></tr>"
        for event in shown
    )
    return (
        f"<section><h2>What happened?</h2><p>Events, in the order of time.{more}</p><div class='scroll'><table>"
        f"<thead><tr><th>{run.unit}</th><th>event</th><th>where</th><th>what</th></tr></thead><tbody>{rows}</tbody></table>"
        "</div></section>"
    )


def _verdict_table(runs: Sequence[Run]) -> str:
    columns = ("status", "layers", "updates", "last loss", "first ÷ last layer")
    head = "".join(f"<th>{name}</th>" for name in ("run", "verdict", *columns, "why"))
    rows = []
    for run in runs:
        known = dict(facts(run))
        cells = "".join(f"<td>{escape(known.get(name, '–'))}</td>" for name in columns)
        rows.append(
            f"<tr><th scope='row'>{escape(run.name)}</th><td>{_badge(run.verdict.kind)}</td>{cells}"
            f"<td>{escape(sentence(run.verdict.message))} {escape(sentence(run.verdict.why))}</td></tr>"
        )
    advice = "".join(
        f"<dt>{escape(run.name)}</dt><dd>{escape(run.verdict.next)}</dd>" for run in runs if run.verdict.next
    )
    following = f'<h2>Next</h2><dl class="advice">{advice}</dl>' if advice else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<section><h2>Verdict</h2><div class='scroll'>{table}</div>{following}</section>"


def _badge(kind: str) -> str:
    return f'<span class="badge" style="--hue:{SERIOUSNESS.get(kind, SERIOUSNESS["unknown"])}">{escape(kind)}</span>'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: #1f2933; font: 16px/1.5 $font; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; font-weight: 650; }
header p, section > p { margin: 0; color: #5f6b7a; font-size: 14px; }
section > p { margin-bottom: 14px; max-width: 100ch; }
section { background: white; border: 1px solid #e3e7ec; border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
dl, figure { margin: 0; }
dd { margin: 0; }
.verdict { border-left: 8px solid var(--hue); }
.verdict dl { display: grid; grid-template-columns: 5.5em 1fr; gap: 12px 8px; }
.verdict dt { color: #5f6b7a; font-size: 14px; line-height: 24px; }
.verdict dd { max-width: 85ch; }
.verdict strong { color: var(--hue); font-size: 24px; line-height: 1.2; font-weight: 700; }
.verdict dt:first-child { line-height: 30px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px 20px; }
.facts dt { color: #5f6b7a; font-size: 13px; }
.facts dd { font-weight: 550; overflow-wrap: anywhere; }
.advice dt { font-weight: 600; margin-top: 8px; }
.advice dd { max-width: 95ch; }
.verdict + section h2, .scroll + h2 { margin-top: 18px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px; }
figure { min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.chart { width: 100%; }
.chart .vega-bind { font-size: 14px; color: #5f6b7a; margin-top: 6px; }
.chart .vega-bind label { display: flex; align-items: center; gap: 10px; }
.chart .vega-bind input { flex: 1; accent-color: #0072b2; }
.chart .vega-bind label > span:last-child { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-top: 1px solid #e3e7ec; }
thead th { border-top: 0; color: #5f6b7a; font-weight: 500; white-space: nowrap; }
tbody th { white-space: nowrap; }
td:last-child { min-width: 240px; }
td, .number { font-variant-numeric: tabular-nums; }
.badge { display: inline-block; padding: 0 8px; border-radius: 10px; color: white; background: var(--hue); font-size: 13px; font-weight: 600; }
footer { padding: 4px 16px 32px; color: #5f6b7a; font-size: 13px; }
@media (max-width: 560px) {
  section { padding: 14px; }
  .verdict dl { grid-template-columns: 1fr; gap: 2px; }
  .verdict dd { margin-bottom: 10px; }
}
</style>
</head>
<body>
<header><h1>$heading</h1><p>$subheading</p></header>
<main>
$body
</main>
<footer>Written by hf-gradguard $version. Point at a plot to read its numbers.</footer>
<script>$library</script>
<script>
for (const [place, spec] of $specs.map((spec, index) => [document.querySelector(`[data-spec="$${index}"]`), spec])) {
  vegaEmbed(place, spec, {mode: "vega-lite", renderer: "canvas", actions: false})
    .catch(error => { place.textContent = "This plot could not be drawn: " + error.message; });
}
</script>
</body>
</html>
""")  # noqa: E501
