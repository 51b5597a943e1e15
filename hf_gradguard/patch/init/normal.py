"""Normal initialisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.patch.init.gpt2 import configured_std
from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_normal, inits


@inits.register("normal")
@dataclass
class Normal(Initialisation):
    """N(0, std²) for each linear map of each branch, whatever the depth.

    What most of Transformers' models begin with, after Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova
    2018, "BERT: Pre-training of deep bidirectional Transformers", arXiv 1810.04805; for a residual rule that scales
    branches itself, where GPT-2's own initialisation would do so twice.

    With `base_width` B and a stream of width d instead of std: std · √(B / d), as maximal update parametrisation has
    it for hidden weights: Greg Yang et al. 2022, "Tensor programs V", arXiv 2203.03466, table 8.
    """

    summary = "normal with std, whatever the depth"
    citation = "Devlin et al. 2018, arXiv 1810.04805"

    std: float | None = None
    """Standard deviation; none for what the config says (`initializer_range` or `init_std`), 0.02 if it says nothing.
    It does not know the width: 0.02 is for 768, and 0.02 · √(768 / width) is as strong in another."""
    base_width: int | None = None
    """The width that `std` is for, if it is to be scaled to this model's."""

    def __post_init__(self) -> None:
        if self.std is not None:
            check_above_zero(std=self.std)
        if self.base_width is not None:
            check_whole(1, base_width=self.base_width)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        std = configured_std(site.anatomy.model.config) if self.std is None else self.std
        if self.base_width is not None:
            std *= (self.base_width / site.width) ** 0.5
        return draw_normal(site.part.shape, generator, std=std)
