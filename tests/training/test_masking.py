"""Masks are Transformers' own, special tokens have none, and they depend on seed, epoch and row alone."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_gradguard.training.blocks import IGNORED, Blocks, Layout, StreamedBlocks
from hf_gradguard.training.masking import MaskedBlocks, MaskedStream, Masks, NewMasks, masked
from hf_gradguard.training.tokenizer import trainable

FEATURES = Features({"input_ids": List(Value("int32")), "words": Value("int64")})
LAYOUT = Layout(32, before=(2,), after=(3,), is_target=False)
WORDS = " ".join(f"w{index}" for index in range(200))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return trainable.parse("words").train([[WORDS]], with_marks=True)


def rows(count: int = 30) -> Dataset:
    """Of words, and among them ends of documents and unknown words."""
    generator = random.Random(0)
    ids = [[generator.choice([3, 1, *range(5, 205)]) for _ in range(100)] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "words": [100] * count}, features=FEATURES)


def blocks() -> Blocks:
    return Blocks(rows(), LAYOUT)


def all_of(data: Any) -> list[dict[str, Tensor]]:
    return [data[index] for index in range(len(data))]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(row[name], its[name]) for row, its in zip(one, other, strict=True) for name in row
    )


def test_of_the_chosen_share_most_are_masked_some_changed_some_left(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = all_of(blocks())
    counts = {"targets": 0, "masked": 0, "left": 0, "words": 0}
    data = MaskedBlocks(blocks(), Masks(tokenizer, 0.3, seed=1))
    for epoch in range(8):
        data.masks.epoch = epoch
        for before, after in zip(plain, all_of(data), strict=True):
            ids, labels = after["input_ids"], after["labels"]
            chosen = labels != IGNORED
            assert torch.equal(labels[chosen], before["input_ids"][chosen])
            assert torch.equal(ids[~chosen], before["input_ids"][~chosen])
            is_special = torch.isin(before["input_ids"], torch.tensor(tokenizer.all_special_ids))
            assert not (chosen & is_special).any(), "marks, ends and unknown words are never asked for"
            counts["targets"] += int(chosen.sum())
            counts["masked"] += int((ids[chosen] == tokenizer.mask_token_id).sum())
            counts["left"] += int((ids[chosen] == labels[chosen]).sum())
            counts["words"] += int((~is_special).sum())
    assert counts["words"] > 20_000
    # Within four standard deviations of a binomial of these shares.
    for part, whole, share in (("targets", "words", 0.3), ("masked", "targets", 0.8), ("left", "targets", 0.1)):
        deviation = (share * (1 - share) / counts[whole]) ** 0.5
        assert abs(counts[part] / counts[whole] - share) < 4 * deviation + 0.1 / 200


def test_masks_are_those_of_transformers_for_the_same_numbers(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    make = torch.Generator

    class Recording:
        def __new__(cls) -> Any:
            class One(make):  # type: ignore[misc, valid-type]
                def manual_seed(self, seed: int) -> Any:
                    seeds.append(seed)
                    return super().manual_seed(seed)

            return One()

    data = MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=4))
    monkeypatch.setattr(torch, "Generator", Recording)
    found = all_of(data)
    monkeypatch.undo()
    assert len(set(seeds)) == len(found), "each row its own"
    for index, (row, seed) in enumerate(zip(found, seeds, strict=True)):
        stock = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
        ids = blocks()[index]["input_ids"].tolist()
        special = [int(token in tokenizer.all_special_ids) for token in ids]
        expected = stock([{"input_ids": ids, "special_tokens_mask": special}])
        assert torch.equal(row["input_ids"], expected["input_ids"][0])
        assert torch.equal(row["labels"], expected["labels"][0])


def test_masks_depend_on_seed_epoch_and_row_and_on_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    one = MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=1))
    first = all_of(one)
    torch.manual_seed(99)
    again = MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=1))
    backwards = [again[index] for index in reversed(range(len(again)))][::-1]
    assert same(first, backwards)
    assert same(first, all_of(pickle.loads(pickle.dumps(one)))), "in another process as well"
    assert not same(first, all_of(MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=2))))
    one.masks.epoch = 1
    assert not same(first, all_of(one))
    one.masks.epoch = 0
    assert same(first, all_of(one))
    assert len({tuple((row["labels"] != IGNORED).tolist()) for row in first}) > 0.9 * len(first)


def test_random_states_are_left_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    all_of(MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=0)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_the_text_itself_is_not_changed(tokenizer: PreTrainedTokenizerBase) -> None:
    held = [{name: value.clone() for name, value in row.items()} for row in all_of(blocks())]
    masks, plain = Masks(tokenizer, 0.5, seed=0), all_of(blocks())
    for index, row in enumerate(plain):
        masks(row, index)
    assert same(plain, held)


def test_a_stream_is_masked_alike_and_anew_when_it_begins_again(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = StreamedBlocks(rows().to_iterable_dataset(), LAYOUT)
    data = masked(stream, Masks(tokenizer, 0.15, seed=1))
    assert isinstance(data, MaskedStream)
    assert isinstance(masked(blocks(), data.masks), MaskedBlocks)
    first = list(data)
    assert same(first, all_of(MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=1))))
    assert same(first, list(data))
    endless = MaskedStream(StreamedBlocks(rows(3).to_iterable_dataset(), LAYOUT, is_endless=True), data.masks)
    again = list(itertools.islice(endless, 20))
    plain = list(itertools.islice(endless._blocks, 20))
    assert torch.equal(plain[0]["input_ids"], plain[10]["input_ids"]), "300 tokens are ten blocks of thirty"
    assert not torch.equal(again[0]["labels"], again[10]["labels"])


def test_the_epoch_is_that_of_the_training_also_after_a_resume(tokenizer: PreTrainedTokenizerBase) -> None:
    masks = Masks(tokenizer, 0.15, seed=1)
    callback = NewMasks(masks)
    for epoch, expected in ((None, 0), (0, 0), (0.999, 0), (1 - 1e-12, 1), (1.0, 1), (2.5, 2), (3, 3)):
        callback.on_epoch_begin(TrainingArguments(use_cpu=True), TrainerState(epoch=epoch), TrainerControl())
        assert masks.epoch == expected


def test_workers_that_outlive_an_epoch_see_the_next(tokenizer: PreTrainedTokenizerBase) -> None:
    data = MaskedBlocks(blocks(), Masks(tokenizer, 0.15, seed=1))
    loader = DataLoader(data, batch_size=16, num_workers=1, persistent_workers=True, collate_fn=default_data_collator)
    for epoch in (0, 1):
        data.masks.epoch = epoch
        batches = list(loader)
        alone = DataLoader(data, batch_size=16, collate_fn=default_data_collator)
        assert same(batches, list(alone))


@pytest.mark.parametrize("missing", ["mask_token", "cls_token", "sep_token"])
def test_a_tokenizer_without_the_marks_is_told(missing: str) -> None:
    tokenizer = trainable.parse("words").train([[WORDS]], with_marks=True)
    setattr(tokenizer, missing, None)
    with pytest.raises(ValueError, match=f"the tokenizer has no {missing}, .* --tokenizer_name wordpiece"):
        Masks(tokenizer, 0.15, seed=0)
