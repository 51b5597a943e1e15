"""The rows of text that a recipe trains and evaluates on, wherever they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_gradguard.registry import nearest
from hf_gradguard.training import files, hub
from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.corpora import PREFIX, Row, corpora

TEXT, LABEL = "text", "label"
"""The columns of what `load_text` gives."""
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "class", "target")

Text: TypeAlias = Dataset | IterableDataset


def load_text(data: DataArguments, *, label_column: str | None = None, with_labels: bool = False) -> dict[str, Text]:
    """The splits `train`, `validation` and, where there is one, `test`, with a column `text` and maybe `label`.

    Where there is no validation split, a share of the training rows becomes it, always the same.

    Args:
        data: what to read.
        label_column: the column of the labels, where it is not named as it usually is.
        with_labels: whether there must be one.

    Raises:
        ValueError: there is no such dataset, file or column, it can't be read, or nothing is in it.
    """
    splits = _builtin(data) if str(data.dataset_name).startswith(PREFIX) else _loaded(data)
    if "train" not in splits:
        raise ValueError(f"{data.source} has no split 'train', only {', '.join(splits)}")
    splits = {name: splits[name] for name in SPLITS if name in splits}
    columns = {_text_column(splits["train"], data): TEXT}
    if with_labels:
        columns[_label_column(splits, label_column, data)] = LABEL
    splits = {name: _only(rows, columns, f"{data.source}, split {name}") for name, rows in splits.items()}
    if "validation" not in splits:
        splits = {**_divided(splits["train"], data), **{name: splits[name] for name in splits if name != "train"}}
    return splits


def first_rows(rows: Text, count: int | None) -> Text:
    """No more than so many rows, from the first."""
    if count is None:
        return rows
    return rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))


def _builtin(data: DataArguments) -> dict[str, Text]:
    assert data.dataset_name is not None
    if data.streaming:
        raise ValueError(f"--streaming is for text that is larger than memory; {data.dataset_name} is small")
    name = data.dataset_name
    features = Features({TEXT: Value("string")})
    splits: dict[str, Text] = {}
    for split, rows in corpora.find(name).splits().items():
        columns = features if LABEL not in rows[0] else Features({**features, LABEL: Value("string")})
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        # Of the content, so that what is made from it is found again in the cache, and only if it is the same.
        source = {"name": name, "part": split, "digest": digest}
        splits[split] = Dataset.from_generator(_generate, features=columns, gen_kwargs=source)
    return splits


def _generate(name: str, part: str, digest: str) -> Iterator[Row]:
    yield from corpora.find(name).splits()[part]


def _loaded(data: DataArguments) -> dict[str, Text]:
    if data.dataset_name is not None:
        hub.prepare(
            data.dataset_name,
            "dataset",
            f"give local files with --train_file, or one of {', '.join(corpora.names())}",
        )
        try:
            found = load_dataset(data.dataset_name, data.dataset_config_name, streaming=data.streaming)
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
            raise ValueError(f"--dataset_name {data.dataset_name!r}: {error}") from None
        return dict(found)
    given = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    paths: dict[str, list[str]] = {split: paths for split, paths in given.items() if paths}
    every = [path for names in paths.values() for path in names]
    builder = files.builder_of(every)
    files.check(every, streaming=data.streaming)
    if data.streaming and "validation" not in paths:
        raise ValueError("a stream can't be divided: with --streaming give --validation_file as well")
    options: dict[str, Any] = {"sample_by": data.sample_by} if builder == "text" else {}
    if builder == "csv" and every[0].split(".")[-1].lower() == "tsv":
        options["sep"] = "\t"
    try:
        return dict(load_dataset(builder, data_files=paths, streaming=data.streaming, **options))
    except DatasetGenerationError as error:
        why = error.__cause__ or error
        raise ValueError(f"{', '.join(every)} can't be read as {builder}: {why}") from None


def _text_column(rows: Text, data: DataArguments) -> str:
    columns = _columns(rows)
    if data.text_column_name is not None:
        return _existing(data.text_column_name, "--text_column_name", columns, data.source)
    for name in TEXT_COLUMNS:
        if name in columns:
            return name
    strings = [str(name) for name, feature in (rows.features or {}).items() if feature == Value("string")]
    if len(strings) == 1:
        return strings[0]
    raise ValueError(f"which column of {data.source} is the text? Give --text_column_name: {', '.join(columns)}")


def _label_column(splits: Mapping[str, Text], name: str | None, data: DataArguments) -> str:
    columns = _columns(splits["train"])
    if name is None:
        name = next((column for column in LABEL_COLUMNS if column in columns), None)
    if name is None:
        raise ValueError(
            f"{data.source} has no column {' or '.join(LABEL_COLUMNS)}: give --label_column_name, one of "
            f"{', '.join(columns)}"
        )
    _existing(name, "--label_column_name", columns, data.source)
    for split, rows in splits.items():
        if name not in _columns(rows):
            raise ValueError(f"split {split} of {data.source} has no column {name!r}, only {', '.join(_columns(rows))}")
    return name


def _existing(name: str, option: str, columns: list[str], source: str) -> str:
    if name not in columns:
        raise ValueError(
            f"{source} has no column {option} {name!r}{nearest(name, columns)}. It has {', '.join(columns)}"
        )
    return name


def _columns(rows: Text) -> list[str]:
    if rows.column_names is None:  # a stream does not know before it has read
        return list(next(iter(rows)))
    return list(rows.column_names)


def _only(rows: Text, columns: dict[str, str], where: str) -> Text:
    missing = [name for name in columns if name not in _columns(rows)]
    if missing:
        raise ValueError(f"{where} has no column {missing[0]!r}, only {', '.join(_columns(rows))}")
    if not isinstance(rows, IterableDataset) and len(rows) == 0:
        raise ValueError(f"{where} has no rows")
    renamed = {name: target for name, target in columns.items() if name != target}
    return rows.select_columns(list(columns)).rename_columns(renamed) if renamed else rows.select_columns(list(columns))


def _divided(rows: Text, data: DataArguments) -> dict[str, Text]:
    if isinstance(rows, IterableDataset):
        raise ValueError(f"{data.source} has no validation split, and a stream can't be divided: leave out --streaming")
    share = data.validation_split_percentage / 100
    if len(rows) < 2:
        raise ValueError(
            f"{data.source} has only one row, of which {data.validation_split_percentage:g} % can't be held out: give "
            "--validation_file, or smaller rows with --sample_by line or paragraph"
        )
    divided: DatasetDict = rows.train_test_split(test_size=share, seed=0)
    return {"train": divided["train"], "validation": divided["test"]}
