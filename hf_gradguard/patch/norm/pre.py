"""Norms before the branches."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.patch.norm.placement import NormPatch, Placement, norms


@norms.register("pre")
@dataclass(frozen=True)
class Pre(NormPatch):
    """x + f(norm(x)), and a norm after the last layer (pre-LN).

    Ruibin Xiong, Yunchang Yang, Di He, Kai Zheng, Shuxin Zheng, Chen Xing, Huishuai Zhang, Yanyan Lan, Liwei Wang,
    Tie-Yan Liu 2020, "On layer normalization in the Transformer architecture", arXiv 2002.04745, table 1. In a model
    that is pre-norm already nothing changes.
    """

    summary = "x + f(norm(x)) and a final norm: pre-LN"
    citation = "Xiong et al. 2020, arXiv 2002.04745"
    placement = Placement(own="input", output=False, final=True)
