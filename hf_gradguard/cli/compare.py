"""`gradguard compare`: several runs laid over one another."""

from __future__ import annotations

import argparse
from pathlib import Path

name = "compare"
help = "lay runs over one another: losses, depth profiles, verdicts"
example = "gradguard compare runs/12-layers runs/100-layers --output compare.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run; give two or more")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("compare.html"), help="the page (default: compare.html)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture as well")


def run(args: argparse.Namespace) -> int:
    from hf_gradguard.report import comparison_summary, load_runs, write_comparison

    if len(args.runs) < 2:
        raise ValueError(f"only {args.runs[0]} was given; give two runs or more, or use: gradguard report RUN")
    runs = load_runs(args.runs)
    print(comparison_summary(runs), flush=True)
    write_comparison(runs, args.output, args.png)
    for path in filter(None, (args.output, args.png)):
        print(f"Written: {path}")
    return 0
