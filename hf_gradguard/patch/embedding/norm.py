"""A norm after the embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_gradguard.patch.anatomy import Stack
from hf_gradguard.patch.embedding.patch import EmbeddingPatch, embeddings


@embeddings.register("norm")
@dataclass(frozen=True)
class NormedEmbedding(EmbeddingPatch):
    """LayerNorm of the sum of the embeddings, after their dropout. Nothing in a model that has such a norm already.

    Teven Le Scao et al. 2022, "BLOOM: A 176B-parameter open-access multilingual language model", arXiv 2211.05100,
    section 3.2.2, after the StableEmbedding of Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer 2021, "8-bit
    optimizers via block-wise quantization", arXiv 2110.02861, section 2.3, which normalises token embeddings alone.
    """

    summary = "LayerNorm of the embeddings"
    citation = "Le Scao et al. 2022, arXiv 2211.05100"
    unfoldable = "a norm is not linear in the embeddings"

    def make(self, stack: Stack) -> nn.Module | None:
        """See `EmbeddingPatch`."""
        if stack.embedding_norm is not None:
            return None
        return nn.LayerNorm(stack.branches[0].output.out_features)
