"""Xavier (Glorot) initialisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.patch.init.initialisation import (
    Distribution,
    Initialisation,
    Site,
    check_distribution,
    draw_xavier,
    inits,
)


@inits.register("xavier")
@dataclass
class Xavier(Initialisation):
    """Variance gain² · 2 / (fan_in + fan_out), for each linear map of each branch.

    Xavier Glorot, Yoshua Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks",
    AISTATS, equations 12 and 16. The gain is torch's addition.
    """

    summary = "variance gain²·2/(fan_in + fan_out)"
    citation = "Glorot & Bengio 2010, AISTATS"

    gain: float = 1.0
    """What the standard deviation is multiplied with."""
    distribution: Distribution = "uniform"
    """`uniform` up to gain · √(6 / (fan_in + fan_out)), or `normal`."""

    def __post_init__(self) -> None:
        check_above_zero(gain=self.gain)
        check_distribution(self.distribution)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        return draw_xavier(site.part.shape, generator, gain=self.gain, distribution=self.distribution)
