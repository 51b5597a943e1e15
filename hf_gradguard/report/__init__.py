"""Shows people what happened in a run: on the terminal, as a page, as a picture. Reads records, never a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.report.runs import Run, run_names
from hf_gradguard.report.terminal import comparison_summary, terminal_summary

__all__ = [
    "Run",
    "comparison_summary",
    "load_runs",
    "terminal_summary",
    "write_comparison",
    "write_report",
    "write_time_profiles",
]

StrPath = str | PathLike[str]


def load_runs(paths: Sequence[StrPath]) -> list[Run]:
    """Reads records under the shortest names that tell them apart.

    Raises:
        RecordError: a path holds no record, or a damaged one.
    """
    return [Run.load(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def write_report(run: StrPath | Run, html: StrPath, png: StrPath | None = None) -> None:
    """Writes the report of a run as one HTML file that needs no network, and, if asked for, as a picture.

    Args:
        run: the run, or its output directory.
        html: where the page goes.
        png: where the picture goes.

    Raises:
        RecordError: there is no record, or it is damaged.
        ModuleNotFoundError: the plotting library is not installed: `pip install 'hf-gradguard[report]'`.
        OSError: a file can't be written.
    """
    from hf_gradguard.report import charts, page, picture

    run = run if isinstance(run, Run) else load_runs([run])[0]
    figures = charts.report_figures(run)
    _write(html, lambda path: path.write_text(page.report_page(run, figures), encoding="utf-8"))
    if png is not None:
        _write(png, lambda path: path.write_bytes(picture.report_picture(run, figures)))


def write_comparison(runs: Sequence[StrPath | Run], html: StrPath, png: StrPath | None = None) -> None:
    """Writes the page, and if asked for the picture, that lays runs over one another.

    Args:
        runs: the runs, or their output directories; at least two.
        html: where the page goes.
        png: where the picture goes.

    Raises:
        ValueError: fewer than two runs were given.
        RecordError: there is no record, or it is damaged.
        ModuleNotFoundError: the plotting library is not installed: `pip install 'hf-gradguard[report]'`.
        OSError: a file can't be written.
    """
    from hf_gradguard.report import charts, page, picture

    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs or more, but {len(runs)} was given")
    loaded = _loaded(runs)
    figures = charts.comparison_figures(loaded)
    _write(html, lambda path: path.write_text(page.comparison_page(loaded, figures), encoding="utf-8"))
    if png is not None:
        _write(png, lambda path: path.write_bytes(picture.comparison_picture(loaded, figures)))


def write_time_profiles(panels: Mapping[str, Mapping[str, TimeProfile]], png: StrPath) -> None:
    """Draws time profiles over one another as a picture, each as shares of its own norm at lag 0.

    Args:
        panels: for each drawing, by a label (empty where there is one only), the profiles by the names of their models.
        png: where the picture goes.

    Raises:
        ValueError: there is nothing to draw.
        ModuleNotFoundError: the plotting library is not installed: `pip install 'hf-gradguard[report]'`.
        OSError: the file can't be written.

    Example:
        >>> write_time_profiles({"": {"GRU": time_profile(gru, batch), "GPT-2": time_profile(gpt2, batch)}}, "back.png")
        ... # doctest: +SKIP
    """
    from hf_gradguard.report import charts, picture

    figure = charts.reach_figure(panels)
    if not figure.panels:
        raise ValueError("there is nothing to draw: no profile has a gradient at lag 0")
    _write(png, lambda path: path.write_bytes(picture.reach_picture(figure)))


def _loaded(runs: Sequence[StrPath | Run]) -> list[Run]:
    read = iter(load_runs([run for run in runs if not isinstance(run, Run)]))
    return [run if isinstance(run, Run) else next(read) for run in runs]


def _write(target: StrPath, write: Callable[[Path], int]) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
