"""Rows with a class each, as a classifier reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.compute
from datasets import ClassLabel, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_gradguard.training.text import LABEL, TEXT, Text

MISSING = (None, "")
"""What stands in the place of a label where there is none."""
HUB_MISSING = -1
"""The same in the test splits of the hub. Where training rows have it, it is a class as any other."""


def without_unlabelled(text: Mapping[str, Text]) -> dict[str, Text]:
    """The splits without a `test` that has no labels at all, as competitions publish it."""
    test, train = text.get("test"), text["train"]
    if test is None or isinstance(test, IterableDataset) or isinstance(train, IterableDataset):
        return dict(text)
    none = {*MISSING, *({HUB_MISSING} if HUB_MISSING not in _distinct(train) else ())}
    return {name: rows for name, rows in text.items() if name != "test" or set(_distinct(rows)) - none}


def find_labels(text: Mapping[str, Text], source: str) -> list[str]:
    """The names of the classes, in the order of their numbers.

    Those of the training rows; of a stream, which is not read to its end for that, those of the validation rows.

    Raises:
        ValueError: a row has no label or several, there is but one class, labels are real numbers, or a split has
            labels that training does not know.
    """
    feature = (text["train"].features or {}).get(LABEL)
    if feature is not None and not isinstance(feature, (ClassLabel, Value)):
        raise ValueError(f"the labels of {source} are {feature}: this recipe takes one class for each row")
    known: list[Any]
    if isinstance(feature, ClassLabel):
        names, known = [str(name) for name in feature.names], list(range(feature.num_classes))
    else:
        known = _distinct(text["validation" if isinstance(text["train"], IterableDataset) else "train"])
        if any(isinstance(value, float) and not value.is_integer() for value in known):
            raise ValueError(
                f"the labels of {source} are real numbers, such as {_few(known)}: this recipe takes classes"
            )
        known = sorted((value for value in known if value not in MISSING), key=_order)
        names = [_name(value) for value in known]
    for split, rows in text.items():
        if not isinstance(rows, IterableDataset):
            _check(rows, known, f"{source}, split {split},", is_class=isinstance(feature, ClassLabel))
    if len(names) < 2:
        raise ValueError(f"all rows of {source} have the label {_few(names)}: there is nothing to tell apart")
    return names


def ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pads with the mark of an end where the tokenizer has none of its own, as GPT-2's.

    Raises:
        ValueError: it has no such mark either.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer has no pad_token and no eos_token, one of which a batch of texts of several lengths "
                "needs: give another --tokenizer_name"
            )
        tokenizer.pad_token = tokenizer.eos_token


def tokenize_rows(
    rows: Text, tokenizer: PreTrainedTokenizerBase, labels: list[str], length: int, workers: int | None = None
) -> Text:
    """Rows as a classifier takes them: what the tokenizer gives, no longer than `length`, and the number of the class
    in `labels`. They are padded when they come together in a batch."""
    numbers = {name: index for index, name in enumerate(labels)}
    feature = (rows.features or {}).get(LABEL)
    is_numbered = isinstance(feature, ClassLabel)
    filler = [0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id]
    # A column of zeros, as BERT's, is what a model takes without one, and costs a third of the time to read a batch.
    has_kinds = any(tokenizer("text").get("token_type_ids") or ())

    def number(value: Any) -> int:
        if (found := numbers.get(_name(value))) is None:  # in a stream, which is not read before
            raise ValueError(f"the training text has a row with the label {value!r}, which validation has not")
        return found

    def work(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer(
            [text or "" for text in batch[TEXT]],
            truncation=True,
            max_length=length,
            return_attention_mask=False,
            return_token_type_ids=has_kinds,
        )
        ids, values = found.pop("input_ids"), batch[LABEL]
        return {
            "input_ids": [row or filler for row in ids],  # a blank text, where no marks are put around it
            **found,
            "labels": values if is_numbered else [number(value) for value in values],
        }

    if isinstance(rows, IterableDataset):
        return rows.map(work, batched=True, remove_columns=[TEXT, LABEL])
    return rows.map(work, batched=True, remove_columns=[TEXT, LABEL], num_proc=workers, desc="Tokenising")


def share_cut(rows: Text, length: int) -> float:
    """Share of the tokenised rows that are as long as they may be, and so perhaps cut off."""
    if isinstance(rows, IterableDataset):
        return 0.0
    lengths = pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    return float((lengths >= length).mean())


def _check(rows: Text, known: list[Any], where: str, *, is_class: bool) -> None:
    found, none = _distinct(rows), {*MISSING, *({HUB_MISSING} if is_class else ())}
    if none & set(found):
        count = sum(value in none for value in rows[LABEL])
        raise ValueError(f"{count:,} of {len(rows):,} rows of {where} have no label")
    if unknown := [value for value in found if value not in known]:
        raise ValueError(
            f"labels differ between the splits: {where} has {_few(unknown)}, which train has not (it has {_few(known)})"
        )


def _distinct(rows: Text) -> list[Any]:
    if isinstance(rows, IterableDataset):
        return list(dict.fromkeys(row[LABEL] for row in rows))
    return list(rows.unique(LABEL))


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _order(value: Any) -> tuple[int, Any]:
    return (1, value) if isinstance(value, str) else (0, value)


def _few(values: list[Any]) -> str:
    return ", ".join(repr(value) for value in values[:5]) + (" …" if len(values) > 5 else "")
