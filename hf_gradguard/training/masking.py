"""Masks for masked language models, which depend on seed, epoch and row and on nothing else.

Drawn from the global random state, as Transformers' collator does it, masks after a resume are others than without:
batches are fetched one ahead, and by workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_gradguard.training.blocks import Blocks, StreamedBlocks

Row = dict[str, Tensor]


class Masks:
    """Masks the rows of one epoch.

    Which tokens, and what becomes of them, is as Transformers has it (Devlin et al. 2019, arXiv:1810.04805): of the
    share that is chosen 80 % are masked, 10 % become another token, 10 % stay. Special tokens are never chosen.

    Args:
        tokenizer: gives the token of the mask.
        probability: the share of tokens that is chosen.
        seed: the same seed gives the same masks.

    Raises:
        ValueError: the tokenizer has no such token, or no marks of begin and end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        for name in ("mask_token", "cls_token", "sep_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"the tokenizer has no {name}, which masked language models need: have one trained, "
                    "--tokenizer_name wordpiece"
                )
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that outlive an epoch see it too
        self._seed = seed
        self._masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    @property
    def epoch(self) -> int:
        """How often the rows have been read before."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def __call__(self, row: Row, index: int) -> Row:
        """A row [tokens] masked, with labels that are -100 where nothing is to be guessed."""
        ids = row["input_ids"][None]
        digest = hashlib.blake2b(f"{self._seed} {self.epoch} {index}".encode(), digest_size=8).digest()
        self._masker.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        inputs, labels = self._masker.torch_mask_tokens(ids.clone(), torch.isin(ids, self._special))
        return {"input_ids": inputs[0], "labels": labels[0]}


class MaskedBlocks(torch.utils.data.Dataset[Row]):
    """Blocks with masks.

    Args:
        blocks: without labels.
        masks: of this split alone.
    """

    def __init__(self, blocks: Blocks, masks: Masks) -> None:
        self._blocks = blocks
        self.masks = masks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Row:
        return self.masks(self._blocks[index], index)


class MaskedStream(torch.utils.data.IterableDataset[Row]):
    """The same of blocks that are read as they are needed."""

    def __init__(self, blocks: StreamedBlocks, masks: Masks) -> None:
        self._blocks = blocks
        self.masks = masks

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(self._blocks):
            yield self.masks(row, index)


def masked(blocks: Blocks | StreamedBlocks, masks: Masks) -> MaskedBlocks | MaskedStream:
    """Blocks with masks, read in the way of what is given."""
    return MaskedBlocks(blocks, masks) if isinstance(blocks, Blocks) else MaskedStream(blocks, masks)


class NewMasks(TrainerCallback):
    """Gives each epoch masks of its own."""

    def __init__(self, masks: Masks) -> None:
        self._masks = masks

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._masks.epoch = int((state.epoch or 0) + 1e-9)
