"""GPT-2's scaled initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_normal, inits


@inits.register("gpt2")
@dataclass
class GPT2(Initialisation):
    """N(0, std²), and std / √(2N) for the output projection of each branch, N being the stack's layers.

    Alec Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3: weights of residual
    layers × 1/√(number of residual layers). That number is 2N, or 3N where layers have cross-attention; Transformers'
    GPT-2 takes 2N there too. The paper's 0.02 for embeddings and 0.01 for positions are not touched here.
    """

    summary = "normal with std, outputs with std/√(2N)"
    citation = "Radford et al. 2019, Language models are unsupervised multitask learners"

    std: float | None = None
    """Standard deviation; none for what the config says (`initializer_range` or `init_std`), 0.02 if it says nothing.
    It does not know the width: 0.02 is for 768, and 0.02 · √(768 / width) is as strong in another."""

    def __post_init__(self) -> None:
        if self.std is not None:
            check_above_zero(std=self.std)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        std = configured_std(site.anatomy.model.config) if self.std is None else self.std
        return draw_normal(
            site.part.shape, generator, std=std / math.sqrt(site.branch.count) if site.is_output else std
        )


def configured_std(config: Any) -> float:
    """The standard deviation that a config gives for the model's own initialisation, 0.02 if none."""
    for name in ("initializer_range", "init_std"):
        if (std := getattr(config, name, None)) is not None:
            return float(std)
    return 0.02
