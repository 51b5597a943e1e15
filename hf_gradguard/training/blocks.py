"""Text as blocks of tokens for language models: tokenised once, packed without padding, read without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.text import TEXT, Text

IGNORED = -100
"""The label of what is no target."""
TOKENS, WORDS = "input_ids", "words"


@dataclass(frozen=True)
class Layout:
    """How a stream of tokens is cut into blocks.

    Args:
        size: tokens of a block, `before` and `after` included.
        overlap: tokens of a block that are the last of the one before. With 1 a causal model is asked for every token
            exactly once, the first of a block being context only.
        before: tokens put in front of each block.
        after: tokens put behind it.
        is_target: whether a block comes with its tokens as labels.
    """

    size: int
    overlap: int = 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    is_target: bool = True

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.stride < 1:
            raise ValueError(
                f"a block of {self.size} tokens holds nothing new: {len(self.before) + len(self.after)} are marks and "
                f"{self.overlap} those of the block before"
            )

    @property
    def inner(self) -> int:
        """Tokens of the text in a block."""
        return self.size - len(self.before) - len(self.after)

    @property
    def stride(self) -> int:
        """Tokens from the beginning of one block to that of the next."""
        return self.inner - self.overlap


def tokenize(rows: Text, tokenizer: PreTrainedTokenizerBase, end: int | None, workers: int | None = None) -> Text:
    """The rows as numbers of tokens, each with `end` behind it; blank rows are left out.

    Args:
        rows: with a column `text`.
        tokenizer: gives the tokens; no marks are put around a text.
        end: the token behind each row, if there is one.
        workers: processes that share the work; None for one, in which the tokenizer uses all threads.

    Returns:
        Rows with `input_ids`, and `words`: how many words stand between blanks, and one more for `end`.
    """
    ending = [] if end is None else [end]

    def work(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = [text for text in batch[TEXT] if text and not text.isspace()]
        found = (
            tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[TOKENS]
            if texts
            else []
        )
        return {
            TOKENS: [ids + ending for ids in found],
            WORDS: [len(text.split()) + len(ending) for text in texts],
        }

    if isinstance(rows, IterableDataset):
        return rows.map(work, batched=True, remove_columns=[TEXT])
    kept = [name for name in rows.column_names if name != TEXT]
    features = Features({TOKENS: List(Value("int32")), WORDS: Value("int64")})
    return rows.map(
        work,
        batched=True,
        remove_columns=[TEXT, *kept],
        features=features,
        num_proc=workers,
        desc="Tokenising",
    )


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Blocks of the tokens of all rows, one after another.

    The tokens stay where `datasets` has mapped them into memory; a block is copied when it is asked for.

    Args:
        rows: what `tokenize` gave.
        layout: how they are cut.
        first: a token in front of all, so that a causal model is asked for the first of the text as well.
        keep_rest: whether the last tokens, too few for a block, become one that is filled up with `filler`, which is no
            target. Else they are left out.
        filler: the token to fill up with.
    """

    def __init__(
        self, rows: Dataset, layout: Layout, *, first: int | None = None, keep_rest: bool = False, filler: int = 0
    ) -> None:
        self._rows, self._first = rows, first
        self._parts = self._read()
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._layout = layout
        self._filler = filler
        self.tokens = int(self._starts[-1])
        """Tokens of the text, the one in front included."""
        self.words: int | None = pyarrow.compute.sum(rows.with_format("arrow")[:].column(WORDS)).as_py() or 0
        """Words of the text, and ends; None where only some of the blocks are left."""
        whole = max(0, (self.tokens - layout.overlap) // layout.stride)
        has_rest = self.tokens - layout.overlap > whole * layout.stride
        self._count = whole + int(keep_rest and has_rest)

    def _read(self) -> list[NDArray[np.int32]]:
        """The tokens as they lie in the file, piece by piece."""
        chunks = self._rows.with_format("arrow")[:].column(TOKENS).chunks
        parts = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks if len(chunk)]
        first = [] if self._first is None else [np.array([self._first], dtype=np.int32)]
        return [part for part in (*first, *parts) if len(part)]

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned reads the file itself, and is not sent all tokens.
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parts = self._read()

    def keep(self, count: int | None) -> None:
        """Leaves the first so many blocks only; all for None."""
        if count is not None and count < self._count:
            self._count, self.words = count, None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"block {index} of {self._count}")
        layout = self._layout
        return _block(layout, self.slice(index * layout.stride, layout.inner), self._filler)

    def slice(self, start: int, count: int) -> NDArray[np.int32]:
        """So many tokens from one on, or those that there are, [tokens]; not copied where they lie in one piece."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        found: list[NDArray[np.int32]] = []
        while count > 0 and part < len(self._parts):
            offset = start - int(self._starts[part])
            piece = self._parts[part][offset : offset + count]
            found.append(piece)
            start, count, part = start + len(piece), count - len(piece), part + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int32)


def _block(layout: Layout, text: NDArray[np.int32], filler: int = 0) -> dict[str, Tensor]:
    """One block of some tokens of a text, filled up with what is no target where they are too few."""
    begin, end = len(layout.before), len(layout.before) + len(text)
    values = np.empty(layout.size, dtype=np.int64)
    values[:begin] = layout.before
    values[begin:end] = text
    values[end:] = filler
    values[begin + layout.inner :] = layout.after
    ids = torch.from_numpy(values)
    if not layout.is_target:
        return {"input_ids": ids}
    labels = ids.clone()
    if len(text) < layout.inner:
        labels[end:] = IGNORED
    return {"input_ids": ids, "labels": labels}


class StreamedBlocks(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The same of rows that are read as they are needed; what is left at the end is left out.

    Args:
        rows: what `tokenize` gave.
        layout: how they are cut.
        is_endless: whether it begins again at the end, in another order. Trainer finds its place again after a resume
            only in a stream that does not end before the training.
    """

    def __init__(self, rows: IterableDataset, layout: Layout, *, is_endless: bool = False) -> None:
        self._rows = rows
        self._layout = layout
        self._is_endless = is_endless

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        layout, held = self._layout, np.empty(0, dtype=np.int32)
        for times in itertools.count() if self._is_endless else range(1):
            if self._is_endless:
                self._rows.set_epoch(times)
            is_empty = True
            for row in self._rows:
                is_empty = False
                held = np.concatenate([held, np.asarray(row[TOKENS], dtype=np.int32)])
                while len(held) >= layout.inner:
                    yield _block(layout, held[: layout.inner])
                    held = held[layout.stride :]
            if is_empty:
                return


def make_blocks(
    text: Mapping[str, Text],
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    data: DataArguments,
    *,
    end: int | None,
    first: int | None = None,
    keep_rest: bool = False,
    seed: int = 0,
) -> dict[str, Blocks | StreamedBlocks]:
    """The blocks of each split.

    Args:
        text: splits of rows with a column `text`.
        tokenizer: gives the tokens.
        layout: how they are cut.
        data: how many processes tokenise, and how many blocks are kept.
        end: the token behind each row.
        first: the token in front of all.
        keep_rest: whether the splits that are evaluated keep what is too short for a block.
        seed: of the order in which a stream is read.

    Raises:
        ValueError: a split does not fill a single block.
    """
    made: dict[str, Blocks | StreamedBlocks] = {}
    for split, rows in text.items():
        is_train = split == "train"
        if isinstance(rows, IterableDataset) and is_train:
            rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
            made[split] = StreamedBlocks(tokenize(rows, tokenizer, end), layout, is_endless=True)
            continue
        if isinstance(rows, IterableDataset):  # what is evaluated again and again is better kept
            rows = Dataset.from_list(list(rows))
        found = tokenize(rows, tokenizer, end, data.preprocessing_num_workers)
        blocks = Blocks(found, layout, first=first, keep_rest=keep_rest and not is_train, filler=end or 0)
        if len(blocks) == 0:
            raise ValueError(
                f"{data.source}, split {split}, has {blocks.tokens:,} tokens, too few for one block of {layout.size}: "
                "give a smaller --block_size"
            )
        blocks.keep(data.max_train_samples if is_train else data.max_eval_samples)
        made[split] = blocks
    return made
