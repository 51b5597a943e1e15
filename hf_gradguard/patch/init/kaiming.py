"""Kaiming (He) initialisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from hf_gradguard.patch.init.initialisation import (
    Distribution,
    Initialisation,
    Site,
    check_distribution,
    draw_normal,
    draw_uniform,
    inits,
)


@inits.register("kaiming")
@dataclass
class Kaiming(Initialisation):
    """Variance gain² / fan_in, where gain⁻² is the mean square of what the map gets of a unit-variance signal.

    That is 1 for the maps that read the stream or values, and E[f(z)²], z from N(0, 1), for the one that reads the
    activation f of its MLP; in a gated MLP too, as the other factor has mean square 1.

    Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun 2015, "Delving deep into rectifiers", arXiv 1502.01852, equations
    7 to 10 and 15. The paper has ReLU (gain √2) and PReLU; here E[f(z)²] is integrated for whatever activation the
    branch has. Where torch.nn.init.calculate_gain has a customary value instead (tanh 5/3, sigmoid 1), this is another:
    1.59 and 1.85.
    """

    summary = "variance gain²/fan_in, the gain by the branch's activation"
    citation = "He et al. 2015, arXiv 1502.01852"

    distribution: Distribution = "normal"
    """`normal`, or `uniform` of the same variance."""

    def __post_init__(self) -> None:
        check_distribution(self.distribution)

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        activation = site.branch.activation if site.is_output else None
        std = (1.0 if activation is None else gain_of(activation.value)) / math.sqrt(site.part.in_features)
        if self.distribution == "normal":
            return draw_normal(site.part.shape, generator, std=std)
        return draw_uniform(site.part.shape, generator, bound=math.sqrt(3.0) * std)


def gain_of(activation: Callable[[Tensor], Tensor]) -> float:
    """E[f(z)²]^-½ of an activation f, z from N(0, 1), to seven digits: √2 for ReLU.

    Raises:
        ValueError: that is no finite number.
    """
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).to("cpu", torch.float64)
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    mean_square = torch.trapezoid(activation(z).square() * density, z).item()
    if not 0 < mean_square < math.inf:
        raise ValueError(
            f"init='kaiming' divides by the mean square of the activation, and that of {activation!r} is {mean_square}"
        )
    return float(mean_square**-0.5)
