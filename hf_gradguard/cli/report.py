"""`gradguard report`: what happened in a run, on the terminal and as a page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

name = "report"
help = "show which layers of a run starve, since when, and what to do"
example = "gradguard report output --png report.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run, finished or not")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page to write (default: report.html in the run's record)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture as well")


def run(args: argparse.Namespace) -> int:
    from hf_gradguard.report import load_runs, terminal_summary, write_report

    (loaded,) = load_runs([args.run])
    print(terminal_summary(loaded, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)
    output = args.output or loaded.record.segments[-1].path.parent / "report.html"
    write_report(loaded, output, args.png)
    for path in filter(None, (output, args.png)):
        print(f"Written: {path}")
    return 0
