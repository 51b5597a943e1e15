"""The initialisation that belongs to DeepNorm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_xavier, inits


@inits.register("deepnorm")
@dataclass
class DeepNormInit(Initialisation):
    """Xavier (normal) with gain β for values, outputs and the MLP, and gain 1 for queries and keys.

    Hongyu Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 layers", arXiv 2203.00555, figure 2. It is made for
    a post-norm model whose residual is multiplied with the α of the same figure. All maps that widen a gated MLP get β;
    the paper has none. Its published code (torchscale) draws from a uniform distribution of the same variance, and
    gives queries, keys and values a further 1/√2, which the paper does not; and where the paper has 0.87 in β, for the
    encoder of an encoder-decoder, its weights are multiplied with 1 ÷ 0.87 (1.15).
    """

    summary = "Xavier, gain β for values, outputs and the MLP"
    citation = "Wang et al. 2022, arXiv 2203.00555"

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        gain = 1.0 if site.role in ("query", "key") else beta(site.anatomy, site.branch)
        return draw_xavier(site.part.shape, generator, gain=gain, distribution="normal")


def beta(anatomy: Anatomy, branch: Branch) -> float:
    """DeepNorm's β for a branch, by the layers of the encoder (N) and the decoder (M).

    Encoder-only and decoder-only (8N)^-¼; with both, 0.87 (N⁴M)^-1/16 in the encoder and (12M)^-¼ in the decoder. A
    decoder with cross-attention whose encoder is not part of the model counts as a decoder with both.
    """
    if branch.stack == "encoder" and len(anatomy.stacks) > 1:
        encoder, decoder = (len(stack.layers) for stack in anatomy.stacks)
        return float(0.87 * (encoder**4 * decoder) ** (-1 / 16))
    return float((4 * branch.count) ** -0.25)  # 2 branches a layer: (8N)^-¼; 3 branches: (12M)^-¼
