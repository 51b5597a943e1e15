"""Classes are found in labels of every type, numbered in their order, and splits that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_gradguard.training import labels
from hf_gradguard.training.text import Text
from hf_gradguard.training.tokenizer import trainable


def rows(values: list[Any], feature: Any = None) -> Dataset:
    features = None if feature is None else Features({"text": Value("string"), "label": feature})
    texts = [f"text {index}" for index in range(len(values))]
    return Dataset.from_dict({"text": texts, "label": values}, features=features)


def splits(train: list[Any], feature: Any = None, **others: list[Any]) -> dict[str, Text]:
    return {name: rows(values, feature) for name, values in {"train": train, **others}.items()}


def stream(train: list[Any], **others: list[Any]) -> dict[str, Text]:
    return {name: part.to_iterable_dataset() for name, part in splits(train, **others).items()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return trainable.parse("words").train([["text one two three four"]], with_marks=True)


def numbers(part: Text, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> list[int]:
    return [row["labels"] for row in labels.tokenize_rows(part, tokenizer, names, 8)]


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        (["b", "a", "b", "c"], ["a", "b", "c"], [1, 0, 1, 2]),
        (["10", "9", "10"], ["10", "9"], [0, 1, 0]),
        ([10, 9, 10, 100], ["9", "10", "100"], [1, 0, 1, 2]),
        ([1.0, 0.0, 4.0], ["0", "1", "4"], [1, 0, 2]),
        ([True, False], ["False", "True"], [1, 0]),
        ([-1, 0, 1, -1], ["-1", "0", "1"], [0, 1, 2, 0]),
        (["None", "NA"], ["NA", "None"], [1, 0]),
    ],
)
def test_classes_are_numbered_in_their_order_whatever_their_type(
    values: list[Any], names: list[str], expected: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    text = splits(values, validation=values[:1])
    assert labels.find_labels(text, "x") == names
    assert numbers(text["train"], tokenizer, names) == expected
    assert numbers(text["validation"], tokenizer, names) == expected[:1]


def test_classes_with_names_keep_the_numbers_that_they_have(tokenizer: PreTrainedTokenizerBase) -> None:
    feature = ClassLabel(names=["world", "business", "art"])
    text = splits([2, 0, 2], feature, validation=[1])
    names = labels.find_labels(text, "x")
    assert names == ["world", "business", "art"]
    assert numbers(text["train"], tokenizer, names) == [2, 0, 2]
    assert numbers(text["validation"], tokenizer, names) == [1]


def test_whole_numbers_and_floats_of_other_splits_are_the_same_classes(tokenizer: PreTrainedTokenizerBase) -> None:
    text = splits([0, 1, 2], validation=[1.0, 2.0])
    assert labels.find_labels(text, "x") == ["0", "1", "2"]
    assert numbers(text["validation"], tokenizer, ["0", "1", "2"]) == [1, 2]


@pytest.mark.parametrize(
    ("train", "others", "told"),
    [
        ([0, 1], {"validation": [0, 2]}, "split validation, has 2, which train has not (it has 0, 1)"),
        ([0, 1], {"validation": [0], "test": [5]}, "split test, has 5"),
        (["a", "b"], {"validation": ["A"]}, "split validation, has 'A', which train has not (it has 'a', 'b')"),
        ([0, 1], {"validation": ["pos", "neg"]}, "split validation, has 'pos', 'neg'"),
        ([0, 1], {"test": [0, -1]}, "split test, has -1"),
        ([0, 1, None], {}, "1 of 3 rows of x, split train, have no label"),
        (["a", "b", "", ""], {}, "2 of 4 rows of x, split train, have no label"),
        (["a", "b"], {"validation": ["a", None]}, "1 of 2 rows of x, split validation, have no label"),
        ([1, 1, 1], {}, "all rows of x have the label '1'"),
        ([0.5, 1.25], {}, "real numbers, such as 0.5, 1.25"),
        ([0.0, 1.0, 0.5], {}, "real numbers"),
        (list(range(100)), {"validation": [100, 101, 102, 103, 104, 105]}, "has 100, 101, 102, 103, 104 …"),
    ],
)
def test_labels_that_can_not_be_classes_are_told(train: list[Any], others: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="x") as caught:
        labels.find_labels(splits(train, **others), "x")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("names", "train", "others", "told"),
    [
        (["a"], [0, 0], {}, "all rows of x have the label 'a'"),
        (["a", "b"], [0, -1], {}, "1 of 2 rows of x, split train, have no label"),
        (["a", "b"], [0, None], {}, "1 of 2 rows of x, split train, have no label"),
        (["a", "b"], [0, 1], {"validation": [1, -1, -1]}, "2 of 3 rows of x, split validation, have no label"),
    ],
)
def test_classes_with_names_that_do_not_fit_are_told(
    names: list[str], train: list[Any], others: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match="x") as caught:
        labels.find_labels(splits(train, ClassLabel(names=names), **others), "x")
    assert told in str(caught.value)


def test_several_labels_in_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="one class for each row"):
        labels.find_labels(splits([[0, 1], [1]], List(Value("int64"))), "x")


@pytest.mark.parametrize(
    ("train", "test", "feature", "is_kept"),
    [
        ([0, 1], [-1, -1], None, False),
        ([0, 1], [-1, -1], ClassLabel(num_classes=2), False),
        ([0, 1], [None, None], Value("int64"), False),
        (["a", "b"], ["", ""], None, False),
        ([0, 1], [-1, 0], None, True),  # and then refused
        ([0, 1], [1, 0], None, True),
        ([-1, 1], [-1, -1], None, True),  # a class as any other
    ],
)
def test_a_test_split_without_labels_is_left_out(
    train: list[Any], test: list[Any], feature: Any, is_kept: bool
) -> None:
    text = splits(train, feature, validation=train, test=test)
    found = labels.without_unlabelled(text)
    assert list(found) == ["train", "validation", "test"][: 2 + is_kept]
    assert found["train"] is text["train"]


def test_of_a_stream_the_classes_are_those_of_validation(tokenizer: PreTrainedTokenizerBase) -> None:
    text = stream([0, 1, 2, 0], validation=[2, 1, 0])
    names = labels.find_labels(text, "x")
    assert names == ["0", "1", "2"]
    assert numbers(text["train"], tokenizer, names) == [0, 1, 2, 0]
    assert labels.without_unlabelled(stream([0, 1], test=[-1, -1])).keys() == {"train", "test"}
    with pytest.raises(ValueError, match="a row with the label 3, which validation has not"):
        numbers(stream([0, 3])["train"], tokenizer, names)


def test_rows_are_what_the_tokenizer_gives_and_cut_at_the_length(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["text one", "two three four text one", "", None]
    part = Dataset.from_dict({"text": texts, "label": ["a", "b", "a", "b"]})
    found = labels.tokenize_rows(part, tokenizer, ["a", "b"], 5)
    assert found.column_names == ["input_ids", "labels"]
    for row, text in zip(found, texts, strict=True):
        assert row["input_ids"] == tokenizer(text or "", truncation=True, max_length=5)["input_ids"]
    assert [len(row["input_ids"]) for row in found] == [4, 5, 2, 2]
    assert labels.share_cut(found, 5) == 0.25
    assert labels.share_cut(found.select([1, 0]), 5) == 0.5
    assert labels.share_cut(found, 4) == 0.5


def test_a_blank_text_without_marks_is_one_token_of_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = trainable.parse("words").train([["text"]], with_marks=False)
    part = Dataset.from_dict({"text": ["", "text"], "label": ["a", "b"]})
    found = labels.tokenize_rows(part, bare, ["a", "b"], 5)
    assert [row["input_ids"] for row in found] == [[bare.pad_token_id], [bare.convert_tokens_to_ids("text")]]


def test_a_column_of_zeros_is_left_out_and_one_that_says_something_is_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    part = rows(["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    named = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    zeros = AutoTokenizer.from_pretrained(tmp_path, **named)
    assert zeros("text")["token_type_ids"] == [0, 0, 0]
    assert labels.tokenize_rows(part, zeros, ["a", "b"], 8).column_names == ["input_ids", "labels"]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["single"][-1]["SpecialToken"]["type_id"] = 2  # as XLNet has it
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    kinds = AutoTokenizer.from_pretrained(tmp_path, **named)
    found = labels.tokenize_rows(part, kinds, ["a", "b"], 8)
    assert [row["token_type_ids"] for row in found] == [kinds(text)["token_type_ids"] for text in part["text"]]
    assert found[0]["token_type_ids"][-1] == 2
