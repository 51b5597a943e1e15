"""Norms on both sides of the branches."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.patch.norm.placement import NormPatch, Placement, norms


@norms.register("sandwich")
@dataclass(frozen=True)
class Sandwich(NormPatch):
    """x + norm(f(norm(x))), and a norm after the last layer.

    Ming Ding et al. 2021, "CogView: Mastering text-to-image generation via Transformers", arXiv 2105.13290
    (Sandwich-LN); Jeonghoon Kim et al. 2025, "Peri-LN: Revisiting normalization layer in the Transformer architecture",
    arXiv 2502.02732. The second norm is new, of the kind of the first, and gets the branch's output
    after dropout. As it undoes any scale of that, initialisations that shrink output projections do nothing here.
    """

    summary = "x + norm(f(norm(x))) and a final norm: Sandwich-LN, Peri-LN"
    citation = "Ding et al. 2021, arXiv 2105.13290; Kim et al. 2025, arXiv 2502.02732"
    placement = Placement(own="input", output=True, final=True)
