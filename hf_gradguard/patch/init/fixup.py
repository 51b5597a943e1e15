"""Fixup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_xavier, inits


@inits.register("fixup")
@dataclass
class Fixup(Initialisation):
    """The output projection of each branch is zero; its other maps are Xavier × L^(−1/(2m − 2)). L counts the model's
    residual branches, m the branch's maps.

    Hongyi Zhang, Yann N. Dauphin, Tengyu Ma 2019, "Fixup initialization: Residual learning without normalization",
    arXiv 1901.09321, section 3. It is made for models without norms. m is 4 in attention (query, key, value, output),
    2 in an MLP and 3 in a gated one; so L^(-1/6), L^(-1/2), L^(-1/4). Xavier is the Transformer's standard
    initialisation, where the paper's residual networks have Kaiming's.

    Only part of the recipe: the paper also has a multiplier on each branch and scalar biases, and a classification
    layer of zeros, which here stays as it is.
    """

    summary = "last map of each branch zero, the others × L^(−1/(2m−2))"
    citation = "Zhang, Dauphin & Ma 2019, arXiv 1901.09321"

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        if site.is_output:
            return torch.zeros(site.part.shape)
        maps = len(site.branch.inner) + 1 if site.branch.inner else 4
        return draw_xavier(site.part.shape, generator, gain=len(site.anatomy.branches) ** (-1 / (2 * maps - 2)))
