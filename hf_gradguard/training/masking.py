"""Masks for masked language models: drawn anew at each step in training, once for what is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, default_data_collator

from hf_gradguard.training.blocks import Blocks

SEED = 0
"""Of the masks of what is evaluated, the same in every run."""


class Masking(DataCollatorForLanguageModeling):
    """Transformers' masking (80 % masked, 10 % another token, 10 % left, of the share that is chosen: Devlin et al.
    2019, arXiv:1810.04805) for blocks of one size. Rows that come with labels are masked already.

    Args:
        tokenizer: gives the token of the mask; its special tokens are never masked.
        mlm_probability: the share of tokens that is chosen.

    Raises:
        ValueError: the tokenizer has no such token, or no marks of begin and end.
    """

    def __post_init__(self) -> None:
        for name in ("mask_token", "cls_token", "sep_token"):
            if getattr(self.tokenizer, name) is None:
                raise ValueError(
                    f"the tokenizer has no {name}, which masked language models need: have one trained, "
                    "--tokenizer_name wordpiece"
                )
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._special = torch.tensor(sorted(self.tokenizer.all_special_ids))

    def torch_call(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch of rows [tokens], with labels that are -100 where nothing is to be guessed."""
        batch: dict[str, Tensor] = default_data_collator(examples)
        if "labels" not in batch:
            special = torch.isin(batch["input_ids"], self._special)
            batch["input_ids"], batch["labels"] = self.torch_mask_tokens(batch["input_ids"], special)
        return batch


def mask_once(rows: Blocks, collator: Masking) -> list[dict[str, Tensor]]:
    """All rows with masks that are the same each time; random states are left as they are."""
    once = type(collator)(tokenizer=collator.tokenizer, mlm_probability=collator.mlm_probability, seed=SEED)
    return [_single(once([rows[index]])) for index in range(len(rows))]


def _single(batch: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {name: values[0] for name, values in batch.items()}
