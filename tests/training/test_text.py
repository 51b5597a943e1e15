"""Rows of text come from files of every kind, in their order, and what is wrong with them is told before training."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import IterableDataset

from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.text import LABEL, TEXT, Text, first_rows, load_text

TEXTS = [f"Sentence {index}, “quoted”, with é and a comma" for index in range(40)]
LABELS = ["good" if index % 3 else "bad" for index in range(40)]


@pytest.fixture(autouse=True)
def _own_cache_and_no_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def table(rows: Iterable[tuple[Any, ...]], header: str, separator: str = ",") -> str:
    quoted = (separator.join('"' + str(value) + '"' for value in row) for row in rows)
    return "\n".join([header.replace(",", separator), *quoted]) + "\n"


def load(*paths: str, labels: bool = False, label_column: str | None = None, **options: Any) -> dict[str, Text]:
    return load_text(DataArguments(train_file=list(paths), **options), with_labels=labels, label_column=label_column)


def column(rows: Text, name: str = TEXT) -> list[Any]:
    return [row[name] for row in rows]


ROWS = list(zip(TEXTS, LABELS, strict=True))
WRITERS = {
    "rows.csv": lambda: table(ROWS, "text,label"),
    "rows.tsv": lambda: table(ROWS, "text,label", "\t"),
    "rows.jsonl": lambda: "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS),
    "rows.json": lambda: json.dumps([{"text": text, "label": label} for text, label in ROWS]),
    "rows.csv.gz": lambda: gzip.compress(table(ROWS, "text,label").encode()),
    "rows.tsv.bz2": lambda: bz2.compress(table(ROWS, "text,label", "\t").encode()),
    "rows.jsonl.gz": lambda: gzip.compress(WRITERS["rows.jsonl"]().encode()),
    "marked.csv": lambda: "\ufeff" + table(ROWS, "text,label"),
    "marked.jsonl": lambda: "\ufeff" + WRITERS["rows.jsonl"](),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", [*WRITERS, "rows.parquet", "large.parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        kind = pa.large_string() if name.startswith("large") else pa.string()
        columns = {"text": pa.array(TEXTS, kind), "label": pa.array(LABELS, kind)}
        pyarrow.parquet.write_table(pa.table(columns), path)
    else:
        write(path, WRITERS[name]())
    found = load(str(path), labels=True, validation_file=[str(path)], streaming=streaming)
    for rows in found.values():
        assert isinstance(rows, IterableDataset) == streaming
        assert column(rows) == TEXTS
        assert column(rows, LABEL) == LABELS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
@pytest.mark.parametrize("break_", ["\n", "\r\n"])
def test_a_text_comes_by_line_paragraph_or_as_one(tmp_path: Path, ending: str, break_: str, streaming: bool) -> None:
    paragraphs = ["\n".join(TEXTS[start : start + 4]) for start in range(0, 40, 4)]
    content = "\n\n".join(paragraphs)
    mark = "" if ending.endswith("gz") else "\ufeff"  # of byte order, as Windows puts it in front
    data = (mark + content).replace("\n", break_).encode()
    path = write(tmp_path / f"a.{ending}", gzip.compress(data) if ending.endswith("gz") else data)
    by = {
        how: column(load(path, validation_file=[path], sample_by=how, streaming=streaming)["train"])
        for how in ("line", "paragraph", "document")
    }
    assert [line for line in by["line"] if line] == TEXTS
    assert by["paragraph"] == paragraphs
    assert by["document"] == [content]


def test_several_files_come_one_after_another(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.txt", f"{name} one\n{name} two\n") for name in ("b", "a")]
    other = write(tmp_path / "c.txt", "c one\n")
    found = load(*paths, validation_file=[other], test_file=[other, paths[0]])
    assert column(found["train"]) == ["b one", "b two", "a one", "a two"]
    assert column(found["validation"]) == ["c one"]
    assert column(found["test"]) == ["c one", "b one", "b two"]


def test_what_a_file_held_before_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ("one\ntwo\nthree", "four\nfive\nsix"):
        write(path, content)
        found = load(str(path))
        assert column(found["train"]) + column(found["validation"]) == content.split("\n")
        path.unlink()


# Which rows are held out


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_of_running_text_the_end_is_held_out(tmp_path: Path, sample_by: Any) -> None:
    break_ = {"line": "\n", "paragraph": "\n\n"}[sample_by]
    path = write(tmp_path / "a.txt", break_.join(TEXTS))
    found = load(path, sample_by=sample_by, validation_split_percentage=10)
    assert column(found["train"]) == TEXTS[:36]
    assert column(found["validation"]) == TEXTS[36:]


@pytest.mark.parametrize(("share", "expected"), [(0.001, 1), (5, 2), (11, 5), (99.99, 39)])
def test_of_other_rows_a_share_is_held_out_and_all_stay_in_order(tmp_path: Path, share: float, expected: int) -> None:
    path = write(tmp_path / "a.csv", table(ROWS, "text,label"))
    found = load(path, labels=True, validation_split_percentage=share)
    places = {split: [TEXTS.index(text) for text in column(rows)] for split, rows in found.items()}
    assert len(places["validation"]) == expected
    assert all(held == sorted(held) for held in places.values())
    assert sorted(places["train"] + places["validation"]) == list(range(40))
    if expected == 5:
        assert places["validation"] != list(range(35, 40)), "drawn from everywhere: tables are often sorted"
    for split, rows in found.items():
        assert column(rows, LABEL) == [LABELS[place] for place in places[split]]


def test_the_same_rows_are_held_out_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", table(ROWS, "text,label"))
    one, other = (column(load(path, validation_split_percentage=20)["validation"]) for _ in range(2))
    assert one == other
    # Also in another process and on another machine: the choice of Python's own generator.
    assert [TEXTS.index(text) for text in one] == sorted(random.Random(0).sample(range(40), 8))


def test_a_test_split_does_not_make_a_validation_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(TEXTS))
    found = load(path, test_file=[path])
    assert {name: len(rows) for name, rows in found.items()} == {"train": 38, "validation": 2, "test": 40}


# Columns


@pytest.mark.parametrize("name", ["text", "sentence", "content", "review"])
def test_the_column_of_the_text_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.csv", table([(index, text) for index, text in enumerate(TEXTS)], f"number,{name}"))
    found = load(path)
    assert found["train"].column_names == [TEXT]
    assert set(column(found["train"]) + column(found["validation"])) == set(TEXTS)


def test_columns_may_be_named_and_all_others_go(tmp_path: Path) -> None:
    rows = [(f"not {text}", text, label, "x") for text, label in ROWS]
    path = write(tmp_path / "a.csv", table(rows, "text,body,stars,label"))
    found = load(path, labels=True, label_column="stars", text_column_name="body", validation_file=[path])
    for each in found.values():
        assert sorted(each.column_names) == [LABEL, TEXT]
        assert column(each) == TEXTS
        assert column(each, LABEL) == LABELS


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_only_what_is_empty_is_missing(tmp_path: Path, ending: str) -> None:
    words = ["NA", "null", "None", "nan", "", "n/a"]
    content = table([(word, word) for word in words], "text,label", {"csv": ",", "tsv": "\t"}[ending])
    path = write(tmp_path / f"a.{ending}", content)
    found = load(path, labels=True, validation_file=[path])["train"]
    assert column(found) == [word or None for word in words]
    assert column(found, LABEL) == [word or None for word in words]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("header", "options", "told"),
    [
        ("text,label", {"text_column_name": "txt"}, "'txt'; did you mean 'text'"),
        ("text,label", {"text_column_name": "label", "labels": True}, "can't be both the text and the label"),
        ("a,b", {}, "which column of a.csv is the text? Give --text_column_name: a, b"),
        ("text,stars", {"labels": True}, "give --label_column_name, one of text, stars"),
        ("text,stars", {"labels": True, "label_column": "star"}, "'star'; did you mean 'stars'"),
    ],
)
def test_a_column_that_is_missing_is_told_with_the_nearest(
    tmp_path: Path, header: str, options: dict[str, Any], told: str, streaming: bool
) -> None:
    path = write(tmp_path / "a.csv", table(ROWS, header))
    with pytest.raises(ValueError, match=r"a\.csv") as caught:
        load(path, validation_file=[path], streaming=streaming, **options)
    assert told in str(caught.value)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("header", "missing"), [("text,stars", "label"), ("body,label", "text")])
def test_a_column_that_one_split_lacks_is_told(tmp_path: Path, split: str, header: str, missing: str) -> None:
    good, bad = (
        write(tmp_path / f"{name}.csv", table(ROWS, name_of)) for name, name_of in (("a", "text,label"), ("b", header))
    )
    paths = {"validation_file": [good], f"{split}_file": [bad]}
    with pytest.raises(ValueError, match=f"split {split} has no column '{missing}', only {header.replace(',', ', ')}"):
        load(good, labels=True, **paths)


def test_splits_may_differ_in_columns_that_are_not_used(tmp_path: Path) -> None:
    one = write(tmp_path / "a.csv", table([(text, 1) for text in TEXTS], "text,number"))
    other = write(tmp_path / "b.csv", table([("x", text) for text in TEXTS], "note,text"))
    assert column(load(one, validation_file=[other])["validation"]) == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table([(index, "x") for index in range(5)], "text,label").replace('"', "")),
        ("a.jsonl", '{"text": ["a", "b"]}\n' * 5),
        ("a.json", "[1, 2, 3]"),
        ("a.json", '{"text": ["a", "b", "c"]}'),
    ],
)
def test_a_column_of_something_else_than_text_is_told(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(ValueError, match=f"column 'text' of {name} holds no text"):
        load(write(tmp_path / name, content))


# What can't be read


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "text,label\na,b\na,b,c,d\n", "can't be read as csv"),
        ("a.csv", 'text,label\na,b\n"x,1\n', "can't be read as csv"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "can't be read as json"),
        ("a.json", "hello", "can't be read as json"),
        ("a.json", "[]", "a.json"),
        ("a.parquet", "nothing of the kind", "can't be read as parquet"),
    ],
)
def test_a_malformed_file_is_named_in_one_message(
    tmp_path: Path, name: str, content: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=told) as caught:
        load(path)
    assert path in str(caught.value) or name in str(caught.value)
    assert capfd.readouterr().err == "", "the library's own lines would stand before the error"


def test_bad_files_are_told_of_every_split(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", "\n".join(TEXTS))
    bad = write(tmp_path / "b.txt", b"ab\xe9")
    for split in ("validation_file", "test_file"):
        with pytest.raises(ValueError, match=r"b\.txt is not UTF-8: byte 2"):
            load(good, **{split: [bad]})
    with pytest.raises(ValueError, match="one kind"):
        load(good, validation_file=[write(tmp_path / "c.csv", "text\na\n")])


def test_a_text_of_one_row_can_not_be_divided(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(TEXTS))
    with pytest.raises(ValueError, match="only one row"):
        load(path, sample_by="document")


def test_a_stream_needs_a_validation_file_and_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(TEXTS))
    with pytest.raises(ValueError, match="--validation_file"):
        load(path, streaming=True)
    empty = write(tmp_path / "a.csv", "text,label\n")
    with pytest.raises(ValueError, match="has no rows"):
        load(empty, validation_file=[empty], streaming=True)


def test_what_is_installed_can_not_be_streamed() -> None:
    with pytest.raises(ValueError, match="--streaming is for text that is larger than memory"):
        load_text(DataArguments(dataset_name="builtin:sotu", streaming=True))


def test_a_folder_of_files_may_stand_in_place_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "train.csv", table(ROWS, "text,label"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", str(tmp_path / "mine")):
        assert len(load_text(DataArguments(dataset_name=name))["train"]) == 38
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"--dataset_name '\./nothing' can't be read"):
        load_text(DataArguments(dataset_name="./nothing"))


def test_the_first_rows_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(TEXTS))
    for streaming in (False, True):
        rows = load(path, validation_file=[path], streaming=streaming)["train"]
        assert column(first_rows(rows, 3)) == TEXTS[:3]
        assert column(first_rows(rows, 1000)) == TEXTS
        assert column(first_rows(rows, None)) == TEXTS
