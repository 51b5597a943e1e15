"""Blocks are the tokens of all rows one after another, cut at a size: nothing is lost, doubled, padded or copied."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, default_data_collator

from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.blocks import IGNORED, Blocks, Layout, StreamedBlocks, make_blocks, tokenize
from hf_gradguard.training.tokenizer import trainable

FEATURES = Features({"input_ids": List(Value("int32")), "words": Value("int64")})


def tokenized(rows: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "words": [len(row) for row in rows]}, features=FEATURES)


def rows_of(lengths: list[int]) -> list[list[int]]:
    """Rows of those lengths, in which every token is another."""
    counter = iter(range(10, 10**6))
    return [[next(counter) for _ in range(length)] for length in lengths]


def random_case(seed: int) -> tuple[list[list[int]], Layout, int | None]:
    generator = random.Random(seed)
    longest = generator.choice([1, 5, 50])
    lengths = [generator.choice([0, 0, 1, generator.randrange(longest + 1)]) for _ in range(generator.randrange(0, 30))]
    before = tuple(range(generator.randrange(3)))
    after = tuple(range(3, 3 + generator.randrange(3)))
    inner = generator.randrange(1, 12)
    layout = Layout(
        len(before) + inner + len(after), generator.randrange(0, inner), before, after, generator.random() < 0.7
    )
    return rows_of(lengths), layout, generator.choice([None, 9])


def plain(
    rows: list[list[int]], layout: Layout, first: int | None, *, keep_rest: bool, filler: int
) -> list[dict[str, list[int]]]:
    """The same with lists: put together, and cut as long as there is something new."""
    text = ([] if first is None else [first]) + [token for row in rows for token in row]
    inner = layout.size - len(layout.before) - len(layout.after)
    found, start = [], 0
    while len(text) - start > layout.overlap:
        piece = text[start : start + inner]
        missing = inner - len(piece)
        start += inner - layout.overlap
        if missing and not keep_rest:
            break
        ids = [*layout.before, *piece, *[filler] * missing, *layout.after]
        block = {"input_ids": ids}
        if layout.is_target:
            shown = len(layout.before) + len(piece)
            block["labels"] = ids[:shown] + [IGNORED] * (len(ids) - shown) if missing else ids
        found.append(block)
    return found


def as_lists(blocks: Any) -> list[dict[str, list[int]]]:
    return [{name: values.tolist() for name, values in block.items()} for block in blocks]


@pytest.mark.parametrize("seed", range(150))
def test_blocks_are_what_lists_would_give(seed: int) -> None:
    rows, layout, first = random_case(seed)
    for keep_rest in (False, True):
        blocks = Blocks(tokenized(rows), layout, first=first, keep_rest=keep_rest, filler=7)
        expected = plain(rows, layout, first, keep_rest=keep_rest, filler=7)
        assert len(blocks) == len(expected)
        assert as_lists(blocks[index] for index in range(len(blocks))) == expected
        assert blocks.tokens == sum(map(len, rows)) + (first is not None)
        assert blocks.words == sum(map(len, rows))
        with pytest.raises(IndexError):
            blocks[len(blocks)]
    for block in expected:
        assert all(len(values) == layout.size for values in block.values())


@pytest.mark.parametrize("seed", range(60))
def test_a_stream_gives_the_same_blocks(seed: int) -> None:
    rows, layout, _ = random_case(seed)
    rows = rows or [[]]
    stream = tokenized(rows).to_iterable_dataset()
    expected = plain(rows, layout, None, keep_rest=False, filler=0)
    streamed = StreamedBlocks(stream, layout)
    assert as_lists(streamed) == expected
    assert as_lists(streamed) == expected, "a second time as well"


@pytest.mark.parametrize("seed", range(30))
def test_with_an_overlap_of_one_every_token_is_asked_for_once(seed: int) -> None:
    generator = random.Random(seed)
    rows = rows_of([generator.randrange(20) for _ in range(generator.randrange(1, 30))])
    blocks = Blocks(tokenized(rows), Layout(generator.randrange(2, 20), overlap=1), first=1, keep_rest=True)
    asked, seen = [], []
    for index in range(len(blocks)):
        labels = blocks[index]["labels"][1:]  # a causal model is asked for the next token
        asked += labels[labels != IGNORED].tolist()
        seen += blocks[index]["input_ids"][:-1][labels != IGNORED].tolist()
    text = [token for row in rows for token in row]
    assert asked == text
    assert seen == [1, *text][: len(text)]


@pytest.mark.parametrize(
    "layout",
    [
        {"size": 0},
        {"size": 2, "before": (1,), "after": (2,)},
        {"size": 1, "overlap": 1},
        {"size": 4, "overlap": 2, "before": (1,), "after": (2,)},
        {"size": 4, "overlap": -1},
    ],
)
def test_a_block_with_nothing_new_in_it_is_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a block of {layout['size']} tokens"):
        Layout(**layout)


def test_tokens_stay_where_they_lie_in_the_file(tmp_path: Path) -> None:
    tokenized(rows_of([30, 0, 50, 20])).save_to_disk(str(tmp_path / "rows"))
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    assert rows.cache_files, "mapped into memory"
    blocks = Blocks(rows, Layout(8, overlap=1))
    on_disk = [chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks]
    assert sum(len(part) for part in on_disk) == 100
    for start in range(0, 90, 7):
        assert any(np.shares_memory(blocks.slice(start, 8), part) for part in on_disk)
    assert not any(np.shares_memory(blocks[0]["input_ids"].numpy(), part) for part in on_disk), "safe to change"


@pytest.mark.parametrize("start", [0, 1, 59, 60, 61, 98, 99, 100, 150])
def test_a_slice_is_what_is_asked_for_or_what_there_is(start: int) -> None:
    parts = [tokenized(rows_of([60])), tokenized([list(range(1000, 1040))])]
    blocks = Blocks(datasets.concatenate_datasets(parts), Layout(8))
    text = [*range(10, 70), *range(1000, 1040)]
    for count in (0, 1, 8, 50, 200):
        assert blocks.slice(start, count).tolist() == text[start : start + count]


def test_only_the_first_blocks_are_kept_if_that_is_asked_for() -> None:
    blocks = Blocks(tokenized(rows_of([100])), Layout(10))
    for count, length, words in ((None, 10, 100), (20, 10, 100), (10, 10, 100), (3, 3, None)):
        blocks.keep(count)
        assert (len(blocks), blocks.words) == (length, words)
    assert blocks[2]["input_ids"].tolist() == list(range(30, 40))
    with pytest.raises(IndexError):
        blocks[3]


def test_a_copy_for_another_process_is_small_and_the_same(tmp_path: Path) -> None:
    tokenized(rows_of([5000] * 40)).save_to_disk(str(tmp_path / "rows"))
    blocks = Blocks(datasets.load_from_disk(str(tmp_path / "rows")), Layout(128, overlap=1), first=3, keep_rest=True)
    sent = pickle.dumps(blocks)
    assert len(sent) < 20_000, "where the tokens lie is sent, not the 800 kB of tokens"
    copy = pickle.loads(sent)
    assert (len(copy), copy.tokens, copy.words) == (len(blocks), blocks.tokens, blocks.words)
    assert as_lists([copy[0], copy[700], copy[len(copy) - 1]]) == as_lists(
        [blocks[0], blocks[700], blocks[len(blocks) - 1]]
    )


@pytest.mark.slow
def test_workers_that_are_spawned_give_the_same_batches(tmp_path: Path) -> None:
    tokenized(rows_of([37] * 40)).save_to_disk(str(tmp_path / "rows"))
    blocks = Blocks(datasets.load_from_disk(str(tmp_path / "rows")), Layout(16, overlap=1), first=3)
    stream = StreamedBlocks(tokenized(rows_of([37] * 40)).to_iterable_dataset(), Layout(16))
    for rows in (blocks, stream):
        options = {"batch_size": 4, "collate_fn": default_data_collator}
        alone = list(DataLoader(rows, **options))
        spawned = list(DataLoader(rows, num_workers=1, multiprocessing_context="spawn", **options))
        assert len(alone) == len(spawned) > 20
        assert all(torch.equal(one["labels"], other["labels"]) for one, other in zip(alone, spawned, strict=True))


# Tokenising

TEXTS = ["one two", "", "  \n", "three\u2003four five\x1csix", None, " seven "]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return trainable.parse("bytes").train([[]], with_marks=True)


@pytest.mark.parametrize("end", [None, 3])
@pytest.mark.parametrize("workers", [None, 2])
def test_rows_are_tokens_with_an_end_and_blank_ones_are_left_out(
    tokenizer: PreTrainedTokenizerBase, end: int | None, workers: int | None
) -> None:
    rows = Dataset.from_dict({"text": TEXTS * 2, "other": list(range(12))})
    found = tokenize(rows, tokenizer, end, workers)
    texts = [text for text in TEXTS * 2 if text and text.strip()]
    ending = [] if end is None else [end]
    assert found.features == FEATURES
    assert found["input_ids"][:] == [[5 + _place(byte) for byte in text.encode()] + ending for text in texts]
    assert found["words"][:] == [len(text.split()) + len(ending) for text in texts]


def _place(byte: int) -> int:
    """Where a byte stands in GPT-2's alphabet, sorted (Radford et al. 2019, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [number for number in range(256) if number not in shown]
    letters = {number: chr(number) for number in shown} | {number: chr(256 + i) for i, number in enumerate(hidden)}
    return sorted(letters.values()).index(letters[byte])


def test_a_stream_of_rows_is_tokenised_alike(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    assert list(tokenize(rows.to_iterable_dataset(), tokenizer, 3)) == list(tokenize(rows, tokenizer, 3))


def test_what_was_tokenised_is_found_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "rows"))
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    one, other = tokenize(rows, tokenizer, 3), tokenize(rows, tokenizer, 3)
    assert one.cache_files == other.cache_files != []
    assert tokenize(rows, tokenizer, 4).cache_files != one.cache_files


def test_splits_become_blocks_each_in_its_way(tokenizer: PreTrainedTokenizerBase) -> None:
    text = {
        name: Dataset.from_dict({"text": [letters]})
        for name, letters in (("train", "abcdefgh"), ("validation", "xyz"), ("test", "uvwxyz"))
    }
    made = make_blocks(
        text,
        tokenizer,
        Layout(4, overlap=1),
        _data(max_train_samples=2, max_eval_samples=1),
        end=3,
        first=3,
        keep_rest=True,
    )
    shown = {split: tokenizer.batch_decode([row["input_ids"] for row in _all(rows)]) for split, rows in made.items()}
    assert shown == {"train": ["</s>abc", "cdef"], "validation": ["</s>xyz"], "test": ["</s>uvw"]}
    assert [made[split].words for split in made] == [None, None, None]
    made = make_blocks(text, tokenizer, Layout(4, overlap=1), _data(), end=3, first=3, keep_rest=True)
    assert [len(rows) for rows in made.values()] == [3, 2, 3]
    assert [rows.words for rows in made.values()] == [2, 2, 2]
    assert made["validation"][1]["labels"].tolist() == [tokenizer.convert_tokens_to_ids("z"), 3, IGNORED, IGNORED]


def test_a_split_that_is_too_short_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    text = {"train": Dataset.from_dict({"text": ["abcdefgh"]}), "validation": Dataset.from_dict({"text": ["x"]})}
    with pytest.raises(ValueError, match="split validation, has 2 tokens, too few for one block of 4"):
        make_blocks(text, tokenizer, Layout(4), _data(), end=3)


def test_of_a_stream_only_the_training_rows_are_read_as_they_are_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_dict({"text": [f"row {index:02}" for index in range(20)]})
    text = {"train": rows.to_iterable_dataset(), "validation": rows.to_iterable_dataset()}
    data = _data(streaming=True, shuffle_buffer=5)
    made = make_blocks(text, tokenizer, Layout(7), data, end=3, seed=1)
    assert isinstance(made["train"], StreamedBlocks)
    assert isinstance(made["validation"], Blocks)
    read = _texts(made["train"], tokenizer, 60)
    passes = [read[start : start + 20] for start in (0, 20, 40)]
    for texts in passes:
        assert sorted(texts) == sorted(f"row {index:02}</s>" for index in range(20))
    assert passes[0] != passes[1] != passes[2] != passes[0], "shuffled anew each time"
    assert _texts(made["train"], tokenizer, 60) == read, "and in the same way by another start"
    assert _texts(make_blocks(text, tokenizer, Layout(7), data, end=3, seed=2)["train"], tokenizer, 60) != read


def test_an_endless_stream_loses_nothing_between_its_rounds(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = tokenized([[10, 11, 12], [13, 14]]).to_iterable_dataset()
    blocks = StreamedBlocks(stream, Layout(4), is_endless=True)
    first = [row["input_ids"].tolist() for row in itertools.islice(blocks, 5)]
    assert first == [[10, 11, 12, 13], [14, 10, 11, 12], [13, 14, 10, 11], [12, 13, 14, 10], [11, 12, 13, 14]]
    assert list(StreamedBlocks(tokenized([[]]).to_iterable_dataset().take(0), Layout(4), is_endless=True)) == []


def _data(**options: Any) -> DataArguments:
    return DataArguments(train_file=["a.txt"], **options)


def _all(rows: Blocks | StreamedBlocks | IterableDataset) -> list[dict[str, torch.Tensor]]:
    return [rows[index] for index in range(len(rows))]  # type: ignore[index, arg-type]


def _texts(stream: Any, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    return list(tokenizer.batch_decode([row["input_ids"] for row in itertools.islice(stream, count)]))


def test_what_several_processes_have_tokenised_becomes_the_same_blocks(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    Dataset.from_dict({"text": [f"row {index} " * (index % 7) for index in range(100)]}).save_to_disk(str(tmp_path))
    rows = datasets.load_from_disk(str(tmp_path))
    layout = Layout(16, overlap=1)
    alone, shared = (Blocks(tokenize(rows, tokenizer, 3, workers), layout, first=3) for workers in (None, 2))
    assert (len(alone), alone.words) == (len(shared), shared.words)
    assert as_lists(_all(alone)) == as_lists(_all(shared))
