"""Normalised queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.patch.attention.heads import attention_branches, attention_module, hang, head_width, refuse
from hf_gradguard.patch.attention.patch import AttentionPatch, attentions


@attentions.register("qk_norm")
@dataclass(frozen=True)
class QKNorm(AttentionPatch):
    """softmax(norm(q) · norm(k) ÷ √d) for each head of width d, so that attention logits can't grow without bound.

    norm is over the d features of one head, with a learned weight [d] that all heads of a branch share, one for queries
    and one for keys; before rotary positions and the scaling with √d.

    Alex Henry, Prudhvi Raj Dachapally, Shubham Shantaram Pawar, Yuxuan Chen 2020, "Query-key normalization for
    Transformers", arXiv 2010.04245, who divide by the L2 norm and multiply the product with one learned number instead
    of 1 ÷ √d. Mostafa Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters", arXiv 2302.05442,
    section 2, have LayerNorm without a bias and keep 1 ÷ √d. RMSNorm, the default here, is that without the mean, as
    most of today's models have it.

    A model that does not divide by √d itself (T5) begins with weights of d^−½ for queries instead of 1, so that
    attention begins as soft as in the others.
    """

    summary = "softmax(norm(q)·norm(k)/√d): attention logits stay bounded"
    citation = "Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442"
    unfoldable = "a norm is not linear in queries and keys"

    kind: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm without a bias."""
    eps: float = 1e-6
    """What is added to the mean square, or to the variance."""

    def __post_init__(self) -> None:
        check_above_zero(eps=self.eps)

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `AttentionPatch`."""
        return refuse(anatomy, "qk_norm", "would do the same again")

    def hang(self, anatomy: Anatomy) -> None:
        """See `AttentionPatch`."""
        for stack, layer, branch in attention_branches(anatomy):
            width = head_width(anatomy, stack, branch)
            is_scaled = getattr(attention_module(layer, branch), "scaling", None) != 1.0
            hang(layer, branch, "query", self._norm(width, 1.0 if is_scaled else width**-0.5), width)
            hang(layer, branch, "key", self._norm(width, 1.0), width)

    def _norm(self, width: int, start: float) -> nn.Module:
        kind = nn.RMSNorm if self.kind == "rms" else _LayerNorm
        norm = kind(width, eps=self.eps)
        with torch.no_grad():
            norm.weight.fill_(start)
        return norm


class _LayerNorm(nn.LayerNorm):
    """LayerNorm without a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, bias=False)
