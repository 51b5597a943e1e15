"""Norms on the stream."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.patch.norm.placement import NormPatch, Placement, norms


@norms.register("post")
@dataclass(frozen=True)
class Post(NormPatch):
    """norm(x + f(x)), and no further norm after the last layer (post-LN).

    Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Łukasz Kaiser, Illia
    Polosukhin 2017, "Attention is all you need", arXiv 1706.03762, section 3.1. In a model that is post-norm already
    nothing changes. A branch whose own norm is no more than the identity, as ModernBERT's first, gets a new one.
    """

    summary = "norm(x + f(x)), no final norm: post-LN"
    citation = "Vaswani et al. 2017, arXiv 1706.03762"
    placement = Placement(own="sum", output=False, final=False)
