"""No norms in the layers."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.patch.norm.placement import NormPatch, Placement, norms


@norms.register("none")
@dataclass(frozen=True)
class NoNorms(NormPatch):
    """x + f(x): branches without norms; by default one norm after the last layer, so that logits have a scale.

    As in Thomas Bachlechner et al. 2020, "ReZero is all you need", arXiv 2003.04887, section 3, and in Xiao Shi Huang
    et al. 2020, "Improving Transformer optimization through better initialization" (T-Fixup), ICML. Both have no norm
    after the last layer either: `final=false`. A norm of the embeddings stays.
    """

    summary = "x + f(x), norms of the branches off; a final norm unless final=false"
    citation = "Bachlechner et al. 2020, arXiv 2003.04887"

    final: bool = True
    """Whether there is a norm after the last layer."""

    @property
    def placement(self) -> Placement:
        """See `NormPatch`."""
        return Placement(own="off", output=False, final=self.final)
