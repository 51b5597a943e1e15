"""The rows of text that a recipe trains and evaluates on, wherever they come from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from hf_gradguard.registry import nearest
from hf_gradguard.training import files, hub
from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.corpora import PREFIX, Row, corpora

TEXT, LABEL = "text", "label"
"""The columns of what `load_text` gives."""
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "class", "target")
STRINGS = (Value("string"), Value("large_string"), Value("string_view"))
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {"encoding": "utf-8-sig"}),
    # Only what is empty is missing: a class may be called None, and a text be "NA".
    "csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    "tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
}
"""The reader of `datasets` for each kind of file, and its options."""

Text: TypeAlias = Dataset | IterableDataset


def load_text(data: DataArguments, *, label_column: str | None = None, with_labels: bool = False) -> dict[str, Text]:
    """The splits `train`, `validation` and, where there is one, `test`, with a column `text` and maybe `label`.

    Where there is no validation split, a share of the training rows becomes it, always the same: of the lines and
    paragraphs of a text, which are read one after another, the last; else any, and the rows stay in their order.

    Args:
        data: what to read.
        label_column: the column of the labels, where it is not named as it usually is.
        with_labels: whether there must be one.

    Raises:
        ValueError: there is no such dataset, file or column, it can't be read, or nothing is in it.
    """
    if data.dataset_name is None:
        splits = _files(data)
    else:
        splits = _builtin(data) if data.dataset_name.startswith(PREFIX) else _dataset(data)
    if "train" not in splits:
        raise ValueError(f"{data.source} has no split 'train', only {', '.join(splits)}")
    splits = {name: splits[name] for name in SPLITS if name in splits}
    columns = {_text_column(splits["train"], data): TEXT}
    if with_labels:
        label = _label_column(splits, label_column, data)
        if label in columns:
            raise ValueError(f"column {label!r} of {data.source} can't be both the text and the label")
        columns[label] = LABEL
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


def _dataset(data: DataArguments) -> dict[str, Text]:
    name = str(data.dataset_name)
    if not Path(name).is_dir():
        remedy = f"give local files with --train_file, or one of {', '.join(corpora.names())}"
        hub.prepare(name, "dataset", remedy)
    try:
        with _quiet():
            return dict(load_dataset(name, data.dataset_config_name, streaming=data.streaming))
    except (DatasetsError, OSError, RuntimeError) as error:
        raise ValueError(f"--dataset_name {name!r} can't be read: {error.__cause__ or error}") from None


def _files(data: DataArguments) -> dict[str, Text]:
    given = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    paths = {split: paths for split, paths in given.items() if paths}
    every = [path for names in paths.values() for path in names]
    kind = files.kind_of(every)
    files.check(every, streaming=data.streaming)
    if data.streaming and "validation" not in paths:
        raise ValueError("a stream can't be divided: with --streaming give --validation_file as well")
    # Each split by itself: read together, all must have the columns and types of the first.
    return {split: _read(split, names, kind, data) for split, names in paths.items()}


def _read(split: str, paths: list[str], kind: str, data: DataArguments) -> Text:
    reader, options = READERS[kind]
    if kind == "text":
        options = {**options, "sample_by": data.sample_by}
    try:
        with _quiet():
            return load_dataset(reader, data_files={split: paths}, split=split, streaming=data.streaming, **options)
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{', '.join(paths)} has no rows") from None
        raise ValueError(f"{', '.join(paths)} can't be read as {kind}: {error.__cause__ or error}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What can't be read is told by an error; without lines of the library's log before it. And the library's server,
    which may be out of reach, is not told of each file that is read."""
    before, counts = datasets.logging.get_verbosity(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _text_column(rows: Text, data: DataArguments) -> str:
    is_text = _columns(rows, data.source)
    name = data.text_column_name
    if name is not None:
        _existing(name, "--text_column_name", list(is_text), data.source)
    else:
        strings = [column for column, is_string in is_text.items() if is_string]
        usual = [column for column in TEXT_COLUMNS if column in is_text]
        name = next(iter(usual or strings), "")
        if not usual and len(strings) != 1:
            raise ValueError(
                f"which column of {data.source} is the text? Give --text_column_name: {', '.join(is_text)}"
            )
    if not is_text[name]:
        kind = f" but {rows.features[name]}" if rows.features else ""
        raise ValueError(f"column {name!r} of {data.source} holds no text{kind}: give another --text_column_name")
    return name


def _label_column(splits: Mapping[str, Text], name: str | None, data: DataArguments) -> str:
    columns = list(_columns(splits["train"], data.source))
    if name is None:
        name = next((column for column in LABEL_COLUMNS if column in columns), None)
    if name is None:
        raise ValueError(
            f"{data.source} has no column {' or '.join(LABEL_COLUMNS)}: give --label_column_name, one of "
            f"{', '.join(columns)}"
        )
    _existing(name, "--label_column_name", columns, data.source)
    return name


def _existing(name: str, option: str, columns: list[str], source: str) -> None:
    if name not in columns:
        raise ValueError(
            f"{source} has no column {option} {name!r}{nearest(name, columns)}. It has {', '.join(columns)}"
        )


def _columns(rows: Text, where: str) -> dict[str, bool]:
    """The columns, and whether each holds text; raises ValueError where there is not a single row."""
    if not isinstance(rows, IterableDataset):
        return {name: feature in STRINGS for name, feature in rows.features.items()}
    first = next(iter(rows), None)  # a stream does not know before it has read
    if first is None:
        raise ValueError(f"{where} has no rows")
    return {name: value is None or isinstance(value, str) for name, value in first.items()}


def _only(rows: Text, columns: dict[str, str], where: str) -> Text:
    found = _columns(rows, where)
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"{where} has no column {missing[0]!r}, only {', '.join(found)}")
    if not isinstance(rows, IterableDataset) and len(rows) == 0:
        raise ValueError(f"{where} has no rows")
    renamed = {name: target for name, target in columns.items() if name != target}
    return rows.select_columns(list(columns)).rename_columns(renamed) if renamed else rows.select_columns(list(columns))


def _divided(rows: Text, data: DataArguments) -> dict[str, Text]:
    if isinstance(rows, IterableDataset):
        raise ValueError(f"{data.source} has no validation split, and a stream can't be divided: leave out --streaming")
    total, share = len(rows), data.validation_split_percentage
    if total < 2:
        raise ValueError(
            f"{data.source} has only one row, of which {share:g} % can't be held out: give --validation_file, or "
            "smaller rows with --sample_by line or paragraph"
        )
    held_out = min(math.ceil(total * share / 100), total - 1)
    is_running_text = bool(data.train_file) and files.kind_of(data.train_file or []) == "text"
    if is_running_text and data.sample_by != "document":
        return {
            "train": rows.select(range(total - held_out)),
            "validation": rows.select(range(total - held_out, total)),
        }
    chosen = set(random.Random(0).sample(range(total), held_out))
    return {
        "train": rows.select([index for index in range(total) if index not in chosen]),
        "validation": rows.select(sorted(chosen)),
    }
