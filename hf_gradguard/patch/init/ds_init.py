"""Depth-scaled initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_xavier, inits
from hf_gradguard.registry import nearest


@inits.register("ds_init")
@dataclass
class DSInit(Initialisation):
    """Uniform up to √(6 / (fan_in + fan_out)) / √l in layer l, counted from 1 in each stack.

    Biao Zhang, Ivan Titov, Rico Sennrich 2019, "Improving deep Transformer with depth-scaled initialization and merged
    attention", arXiv 1908.11365, equation 8 with α = 1. The authors' code scales the variance by 1/√l instead, so that
    the bound shrinks with l^-¼ only: `form="code"`.
    """

    summary = "Xavier × 1/√l in layer l"
    citation = "Zhang, Titov & Sennrich 2019, arXiv 1908.11365"

    form: Literal["paper", "code"] = "paper"
    """`paper`: l^-½. `code`: l^-¼, as the authors' code does."""

    def __post_init__(self) -> None:
        if self.form not in ("paper", "code"):
            raise ValueError(f"form={self.form!r}{nearest(self.form, ['paper', 'code'])} must be one of paper, code")

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        power = -0.5 if self.form == "paper" else -0.25
        return draw_xavier(site.part.shape, generator, gain=(site.branch.layer + 1) ** power)
