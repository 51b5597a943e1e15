"""Dropouts of recurrent models. All are nothing outside training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LockedDropout(nn.Module):
    """Drops the same units in all steps of a row of `[batch, steps, width]`.

    Yarin Gal, Zoubin Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    arXiv 1512.05287, for what goes into and out of layers.

    Args:
        share: of the units that are dropped; the others are divided by 1 − share.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return hidden
        kept = functional.dropout(torch.ones_like(hidden[:, :1]), self.share)
        return hidden * kept

    def extra_repr(self) -> str:
        return f"share={self.share}"


def make_dropout(share: float, locked: bool) -> nn.Module:
    """Dropout of units, the same in all steps of a row or others in each."""
    return LockedDropout(share) if locked else nn.Dropout(share)


def drop_words(embedded: Tensor, words: Tensor, vocabulary: int, share: float) -> Tensor:
    """Drops words wherever they stand: as dropping their rows of the embedding, the others divided by 1 − share.

    Args:
        embedded: the words' embeddings, `[batch, steps, width]`.
        words: their ids, `[batch, steps]`.
        vocabulary: how many words there are.
        share: of the words that are dropped.
    """
    kept = functional.dropout(torch.ones(vocabulary, dtype=embedded.dtype, device=embedded.device), share)
    return embedded * kept[words].unsqueeze(-1)
