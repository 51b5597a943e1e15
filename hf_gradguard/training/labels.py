"""Rows with a class each, as a classifier reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_gradguard.training.text import LABEL, TEXT, Text

UNLABELLED = (None, -1, "")
"""What stands in the place of a label where there is none; the hub's test splits have -1."""


def without_unlabelled(text: Mapping[str, Text]) -> dict[str, Text]:
    """The splits without a `test` that has no labels at all, as competitions publish it."""
    test = text.get("test")
    if test is None or isinstance(test, IterableDataset) or set(test.unique(LABEL)) - set(UNLABELLED):
        return dict(text)
    return {name: rows for name, rows in text.items() if name != "test"}


def find_labels(text: Mapping[str, Text], source: str) -> list[str]:
    """The names of the classes, in the order of their numbers.

    Those of the training rows; of a stream, which is not read to its end for that, those of the validation rows.

    Raises:
        ValueError: a row has no label, there is but one class, labels are real numbers, or a split has labels that
            training does not know.
    """
    feature = (text["train"].features or {}).get(LABEL)
    if isinstance(feature, ClassLabel):
        _check_each(text, list(range(feature.num_classes)), source)
        return [str(name) for name in feature.names]
    known = "validation" if isinstance(text["train"], IterableDataset) else "train"
    found = _values(text[known])
    if any(isinstance(value, float) and not value.is_integer() for value in found):
        raise ValueError(f"the labels of {source} are real numbers, such as {_few(found)}: this recipe takes classes")
    _check_each(text, found, source)
    if len(found) < 2:
        raise ValueError(f"all rows of {source} have the label {_few(found)}: there is nothing to tell apart")
    return [_name(value) for value in sorted(found, key=_order)]


def tokenize_rows(
    rows: Text, tokenizer: PreTrainedTokenizerBase, labels: list[str], length: int, workers: int | None = None
) -> Text:
    """Rows as a classifier takes them: what the tokenizer gives, no longer than `length`, and the number of the class
    in `labels`. They are padded when they come together in a batch."""
    numbers = {name: index for index, name in enumerate(labels)}
    feature = (rows.features or {}).get(LABEL)
    is_numbered = isinstance(feature, ClassLabel)

    def work(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer(
            [text or "" for text in batch[TEXT]], truncation=True, max_length=length, return_attention_mask=False
        )
        values = batch[LABEL]
        return {**found, "labels": values if is_numbered else [numbers[_name(value)] for value in values]}

    if isinstance(rows, IterableDataset):
        return rows.map(work, batched=True, remove_columns=[TEXT, LABEL])
    return rows.map(work, batched=True, remove_columns=[TEXT, LABEL], num_proc=workers, desc="Tokenising")


def share_cut(rows: Text, length: int) -> float:
    """Share of the tokenised rows that are as long as they may be, and so perhaps cut off."""
    if isinstance(rows, IterableDataset):
        return 0.0
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sum(size >= length for size in lengths) / len(lengths)


def _check_each(text: Mapping[str, Text], known: list[Any], source: str) -> None:
    for split, rows in text.items():
        if isinstance(rows, IterableDataset):
            continue
        missing = sum(value in UNLABELLED for value in rows[LABEL])
        if missing:
            raise ValueError(f"{missing:,} of {len(rows):,} rows of {source}, split {split}, have no label")
        unknown = [value for value in rows.unique(LABEL) if value not in known]
        if unknown:
            raise ValueError(
                f"labels differ between the splits of {source}: {split} has {_few(unknown)}, which train has not "
                f"(it has {_few(known)})"
            )


def _values(rows: Text) -> list[Any]:
    if isinstance(rows, IterableDataset):
        return list(Counter(row[LABEL] for row in rows))
    return list(rows.unique(LABEL))


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _order(value: Any) -> tuple[int, Any]:
    return (1, value) if isinstance(value, str) else (0, value)


def _few(values: list[Any]) -> str:
    return ", ".join(repr(value) for value in values[:5]) + (" …" if len(values) > 5 else "")
