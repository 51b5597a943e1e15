"""Small initialisation, with Wang initialisation of the output projections."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Generator, Tensor

from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_normal, inits


@inits.register("small")
@dataclass
class Small(Initialisation):
    """N(0, 2 / (5d)), and standard deviation 2 / (N√d) for the output projection of each branch; d is the width of the
    residual stream and N the stack's layers.

    √(2 / (5d)): Toan Q. Nguyen, Julian Salazar 2019, "Transformers without tears", arXiv 1910.05895, section 2.2 (what
    Xavier gives a d × 4d matrix, for all of them). 2 / (N√d): Ben Wang, in GPT-J; both together are in Sid Black et al.
    2022, "GPT-NeoX-20B", arXiv 2204.06745, section 2.3. Embeddings are not touched here.
    """

    summary = "normal with std √(2/5d), outputs with 2/(N√d)"
    citation = "Nguyen & Salazar 2019, arXiv 1910.05895; Black et al. 2022, arXiv 2204.06745"

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        d = site.width
        std = 2 / (site.branch.depth * math.sqrt(d)) if site.is_output else math.sqrt(2 / (5 * d))
        return draw_normal(site.part.shape, generator, std=std)
