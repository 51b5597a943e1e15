"""A multiplier after the embeddings."""

from __future__ import annotations

import math
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
        if any(_weight(module).is_meta for module in stack.embeddings):
            return Gain(1.0)  # its value comes with the model's
        square = _mean_square(stack)
        if not 0 < square < math.inf:
            raise ValueError(
                f"embedding='unit_rms': the embeddings of the {stack.name} have the mean square {square}, which no "
                "factor brings to 1; initialise the model first"
            )
        return Gain(square**-0.5)

    def fold(self, module: nn.Module) -> float:
        """See `EmbeddingPatch`."""
        assert isinstance(module, Gain), "make gave this"
        return module.gain.item()


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight.detach()


def _mean_square(stack: Stack) -> float:
    """Mean square of the sum of what the lookups give, each at a random place of its own: E|Σe|² = ΣE|e|² + |ΣEe|² −
    Σ|Ee|². The last two matter where embeddings have means that are not zero, as trained ones do."""
    tokens, *others = stack.embeddings
    moments = [_projected(tokens, stack.embedding_projection), *map(_moments, others)]
    mean = torch.stack([mean for mean, _ in moments])
    return float(sum(square for _, square in moments) + mean.sum(0).square().mean() - mean.square().sum(0).mean())


def _moments(module: Any) -> tuple[Tensor, float]:
    """The mean vector of what a lookup gives [width], on the CPU in float64, and the mean square of its numbers."""
    scale = getattr(module, "embed_scale", None) or 1.0  # BART multiplies what it has looked up
    weight = _weight(module)
    square = torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2 / weight.numel()
    return scale * weight.mean(0, dtype=torch.float64).cpu(), scale**2 * square


def _projected(module: Any, projection: Any) -> tuple[Tensor, float]:
    """As `_moments`, where what is looked up is narrower than the stream and goes through a linear map."""
    if projection is None:
        return _moments(module)
    mean, _ = _moments(module)
    matrix, weight = _weight(projection).double().cpu(), _weight(module).double().cpu()
    second_moment = weight.T @ weight / len(weight)
    return matrix @ mean, ((matrix @ second_moment) * matrix).sum().item() / len(matrix)
