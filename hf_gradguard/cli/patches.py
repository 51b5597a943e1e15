"""`gradguard patches`: what a model can be patched with."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_gradguard.patch.catalogue import PatchInfo

name = "patches"
help = "list presets, the parts of a patch, and the architectures that can be patched"
example = "gradguard patches --part residual"

WIDTH = 100
INDENT = 24
"""Where the text begins, behind name and marks."""
LEGEND = """\
K  a pretrained model computes the same as before        k  it does under the condition given
F  gradguard fold merges it into the weights             f  it does under the condition given
In parentheses are the options with their defaults, or what a preset stands for. To use them:
patch_model(model, "deepnorm") or patch_model(model, "residual=layerscale:init=0.1;norm=pre")"""
TITLES = {
    "preset": "Presets: parts that belong together",
    "residual": "residual: what becomes of a branch where it meets the stream",
    "norm": "norm: where norms act",
    "init": "init: new values for the weights of the branches",
    "activation": "activation: that of the MLPs; F where the config has a field for it",
    "attention": "attention: what is changed inside attention",
    "embedding": "embedding: what is done to the stream before the first layer",
    "architecture": "Architectures: config.model_type of what can be patched; register_architecture adds one",
}
"""Each section with its heading, in the order in which they are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", choices=list(TITLES), metavar="PART", help=f"show one section alone: {', '.join(TITLES)}"
    )


def run(args: argparse.Namespace) -> int:
    from hf_gradguard.patch.catalogue import list_patches

    infos = list_patches()
    sections = list(TITLES) if args.part is None else [args.part]
    blocks = [[TITLES[section], *_section(section, infos)] for section in sections]
    print("\n\n".join("\n".join(lines) for lines in [*blocks, [LEGEND]]))
    return 0


def _section(section: str, infos: Sequence[PatchInfo]) -> Iterator[str]:
    if section == "activation":
        from transformers.activations import ACT2FN

        yield _paragraph("  ", ", ".join(sorted(ACT2FN)), indent=2)
    elif section == "architecture":
        from hf_gradguard.patch.architectures import list_architectures

        yield _paragraph("  ", ", ".join(list_architectures()), indent=2)
    for info in infos:
        if info.part == section:
            yield _entry(info)


def _entry(info: PatchInfo) -> str:
    """Name, marks, summary and options; then citation and conditions."""
    marks = {"k": info.preserving, "f": info.folds}
    start = f"  {info.name:18} {''.join(_mark(when, mark) for mark, when in marks.items())} "
    text = f"{info.summary} ({info.options})" if info.options else info.summary
    conditions: dict[str, list[str]] = {}
    for mark, when in marks.items():
        if _mark(when, mark) == mark:
            conditions.setdefault(when, []).append(mark)
    notes = [f"{', '.join(those)} {when}" for when, those in conditions.items()]
    return "\n".join(
        (_paragraph(start, text, INDENT), _paragraph(" " * INDENT, ". ".join([info.citation, *notes]), INDENT))
    )


def _mark(when: str, mark: str) -> str:
    return {"always": mark.upper(), "never": " "}.get(when, mark)


def _paragraph(start: str, text: str, indent: int) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
