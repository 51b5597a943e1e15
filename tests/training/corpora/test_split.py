"""Rows are divided in the same way each time, and no text stands on two sides."""

from __future__ import annotations

import random

import pytest

from hf_gradguard.training.corpora.split import divide


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_on_one_side_and_the_first_row_of_it_is_kept(seed: int) -> None:
    generator = random.Random(seed)
    rows = [{"text": str(generator.randrange(50)), "label": str(index)} for index in range(generator.randrange(1, 200))]
    shares = {"validation": generator.random() / 2, "test": generator.random() / 2}
    splits = divide(rows, shares)
    assert list(splits) == ["train", "validation", "test"]
    found = [row for part in splits.values() for row in part]
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["text"], row["label"])
    assert {row["text"]: row["label"] for row in found} == first
    assert len(found) == len(first)
    assert splits == divide(rows, shares)
    held_out = round(shares["validation"] * len(first))
    assert len(splits["validation"]) == held_out
    assert len(splits["test"]) == round(shares["test"] * (len(first) - held_out))


def test_rows_that_are_sorted_are_mixed() -> None:
    rows = [{"text": str(index), "label": "ab"[index >= 500]} for index in range(1000)]
    for part in divide(rows, {"validation": 0.1, "test": 0.1}).values():
        share = sum(row["label"] == "a" for row in part) / len(part)
        assert 0.35 < share < 0.65


def test_the_order_is_that_of_pythons_own_generator() -> None:
    rows = [{"text": str(index)} for index in range(10)]
    order = list(range(10))
    random.Random(0).shuffle(order)
    assert [int(row["text"]) for row in divide(rows, {})["train"]] == order
