"""A multiplier after the embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.patch.anatomy import Stack
from hf_gradguard.patch.embedding.patch import EmbeddingPatch, embeddings


class Gain(nn.Module):
    """g · x with a constant g.

    Args:
        gain: g.
    """

    gain: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([gain]))

    def forward(self, x: Tensor) -> Tensor:
        """g · x."""
        return self.gain * x


@embeddings.register("unit_rms")
@dataclass(frozen=True)
class UnitRMS(EmbeddingPatch):
    """g · x with a constant g, 1 ÷ the root mean square that the sum of the embeddings has when the model is patched,
    over all tokens and positions alike. Nothing in a model whose embeddings are followed by a norm.

    The multiplier stands behind the lookup, so that output embeddings that are tied to the input embeddings, and with
    them the logits, stay as they are. Embeddings of standard deviation 0.02 are drowned by the first branches of a deep
    model whose branches begin at a scale of one. Sho Takase, Shun Kiyono, Sosuke Kobayashi, Jun Suzuki 2023, "Spike no
    more: Stabilizing the pre-training of large language models", arXiv 2312.16903, after
    Ashish Vaswani et al. 2017, arXiv 1706.03762, section 3.4, who multiply with √d.
    """

    summary = "embeddings × a constant that makes their root mean square 1"
    citation = "Takase et al. 2023, arXiv 2312.16903"

    def make(self, stack: Stack) -> nn.Module | None:
        """See `EmbeddingPatch`."""
        if stack.embedding_norm is not None:
            return None
        square = sum(_mean_square(module) for module in stack.embeddings)
        if stack.embedding_projection is not None:
            square = _projected(stack)
        if not square > 0:
            raise ValueError(
                f"embedding='unit_rms': the embeddings of the {stack.name} are all zero, so that no factor brings "
                "their root mean square to 1; initialise the model first"
            )
        return Gain(square**-0.5)

    def fold(self, module: nn.Module) -> float:
        """See `EmbeddingPatch`."""
        assert isinstance(module, Gain), "make gave this"
        return module.gain.item()


def _mean_square(module: Any) -> float:
    """Mean square of the numbers that a lookup gives."""
    scale = getattr(module, "embed_scale", None) or 1.0  # BART multiplies what it has looked up
    weight: Tensor = module.weight
    return 1.0 if weight.is_meta else scale**2 * weight.detach().double().square().mean().item()


def _projected(stack: Stack) -> float:
    """Mean square of the sum of the embeddings where the token embeddings, narrower, go through a projection."""
    tokens, *others = stack.embeddings
    embedding: Any = tokens
    projection: Any = stack.embedding_projection
    if embedding.weight.is_meta:
        return 1.0
    weight = embedding.weight.detach().double()
    second_moment = weight.T @ weight / len(weight)
    matrix = projection.weight.detach().double()
    tokens_square = ((matrix @ second_moment) * matrix).sum().item() / len(matrix)
    return float(tokens_square + sum(map(_mean_square, others)))
