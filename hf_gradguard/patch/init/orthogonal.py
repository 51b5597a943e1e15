"""Orthogonal initialisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.patch.init.initialisation import Initialisation, Site, draw_orthogonal, inits


@inits.register("orthogonal")
@dataclass
class Orthogonal(Initialisation):
    """A random matrix with orthogonal rows or columns, whichever are fewer, each of length `gain`.

    Andrew M. Saxe, James L. McClelland, Surya Ganguli 2013, "Exact solutions to the nonlinear dynamics of learning in
    deep linear neural networks", arXiv 1312.6120, section 3. Query, key and value are each orthogonal for themselves,
    also where they lie in one weight.
    """

    summary = "orthogonal rows or columns of length gain"
    citation = "Saxe et al. 2013, arXiv 1312.6120"

    gain: float = 1.0
    """Length of the rows or columns."""

    def __post_init__(self) -> None:
        check_above_zero(gain=self.gain)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        return draw_orthogonal(site.part.shape, generator, gain=self.gain)
