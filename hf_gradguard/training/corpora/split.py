"""Dividing rows into splits, the same at every call."""

from __future__ import annotations

import random

from hf_gradguard.training.corpora import Row, Splits


def divide(rows: list[Row], shares: dict[str, float]) -> Splits:
    """Divides shuffled rows; of a text that occurs more than once the first is kept, so that none is on both sides.

    Args:
        rows: each with a `text`.
        shares: of each split besides `train`, each of what those before it have left; `train` gets the rest.
    """
    first = {row["text"]: row for row in reversed(rows)}
    unique = [row for row in rows if first[row["text"]] is row]
    random.Random(0).shuffle(unique)
    splits: Splits = {}
    for name, share in shares.items():
        size = round(share * len(unique))
        splits[name], unique = unique[:size], unique[size:]
    return {"train": unique, **splits}
