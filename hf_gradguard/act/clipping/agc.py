"""Clipping of every unit relative to its weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.policy import ClipPolicy, Outcome, policies
from hf_gradguard.backends.dtensor import is_sharded
from hf_gradguard.observe.norms import HostCopy

# Larger norms have squares that float32 can't hold.
_LARGE = 1e18


@policies.register("agc")
@dataclass
class AGC(ClipPolicy):
    """Multiplies the gradient of each unit i with min(1, λ·max(‖W_i‖, ε) ÷ ‖G_i‖), where W_i are the unit's weights. A
    unit is what makes one output of a layer, as `read_units` finds it; a vector is one unit.

    Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan 2021, "High-performance large-scale image recognition
    without normalization", arXiv 2102.06171, equation 3. As the paper found best (section 4.1), the final linear layer
    is not clipped; where it is tied to the embeddings, that leaves out those too, and `head=true` clips both.

    Each gradient and weight is read once more for this. On a GPU the factors stay on the device, so nothing waits, and
    everything that could be over is multiplied; on a CPU only what has a unit that is over.
    """

    clipping: float = 0.01
    """λ: the largest ratio of a unit's gradient to its weights that is left alone."""
    eps: float = 1e-3
    """ε: the smallest norm that a unit's weights are taken to have, so that those that begin at zero can move."""
    head: bool = False
    """Whether the final linear layer is clipped too."""

    def __post_init__(self) -> None:
        check_above_zero(clipping=self.clipping, eps=self.eps)

    def refuse(self, parameters: Sequence[nn.Parameter]) -> str | None:
        """See `ClipPolicy`: units must be whole on every process."""
        sharded = sum(map(is_sharded, parameters))
        if not sharded:
            return None
        return (
            f"clip='agc' holds each unit's gradient against its weights, but {sharded} of {len(parameters)} parameters "
            "are sharded (DTensor), so that no process has whole units. Rules that need only norms work: global, "
            "layer, autoclip, zclip, adagc"
        )

    @torch.no_grad()
    def clip(self, gradient: Gradient) -> UnitClip | None:
        """See `ClipPolicy`."""
        if not gradient.is_clippable:
            return None
        # No unit is over where the whole gradient is not above the lowest limit that a unit can have.
        could_be_over = np.flatnonzero(gradient.norms > self.clipping * self.eps).tolist()
        chosen = [index for index in could_be_over if self.head or index not in gradient.units.final]
        if not chosen:
            return None
        excess = [self._excess(gradient, index) for index in chosen]
        home = excess[0].device
        largest = HostCopy(torch.stack([found.to(home, non_blocking=True) for found in torch._foreach_max(excess)]))
        factors: list[Tensor | None] = [None] * len(gradient.names)
        is_over = largest.values() > 1 if home.type == "cpu" else np.ones(len(chosen), dtype=bool)
        if not is_over.any():
            return None
        multipliers = torch._foreach_reciprocal(list(itertools.compress(excess, is_over)))
        torch._foreach_clamp_max_(multipliers, 1.0)
        for index, multiplier in zip(itertools.compress(chosen, is_over), multipliers, strict=True):
            factors[index] = multiplier
        return UnitClip(factors, chosen, largest, self.clipping)

    def _excess(self, gradient: Gradient, index: int) -> Tensor:
        """How many times larger than its limit each unit's gradient is, shaped to be broadcast over the gradient."""
        parameter, dimensions = gradient.parameters[index], gradient.units.dimensions[index]
        weight, found = parameter.detach(), parameter.grad
        assert found is not None, "a parameter with a norm has a gradient"
        if found.layout == torch.sparse_coo:
            found = found.coalesce()
            weight, found = weight.index_select(0, found.indices()[0]), found.values()
        wide = found.dtype == torch.float64 or gradient.norms[index] > _LARGE
        dtype = torch.float64 if wide else torch.float32
        limits = _unit_norms(weight, dimensions, dtype).clamp_(min=self.eps).mul_(self.clipping)
        return _unit_norms(found, dimensions, dtype).div_(limits)


@dataclass(frozen=True)
class UnitClip:
    """A clip whose factors are on the device."""

    factors: Sequence[Tensor | None]
    """`[P]`, each with one number for each unit, shaped to be broadcast; None where a gradient is left alone."""
    indices: Sequence[int]
    """The parameters that were looked at."""
    largest: HostCopy
    """How many times larger than its limit the worst unit of each of them is."""
    clipping: float
    """The limit, as a ratio of gradient to weights."""

    @torch.no_grad()
    def apply(self, gradient: Gradient) -> None:
        """See `Clip`."""
        gradients, factors = [], []
        for parameter, factor in zip(gradient.parameters, self.factors, strict=True):
            if factor is not None:
                gradients.append(_stored(parameter))
                factors.append(factor)
        torch._foreach_mul_(gradients, factors)

    def outcome(self) -> Outcome | None:
        """See `Clip`."""
        largest = self.largest.values()
        worst = int(np.argmax(largest))
        excess = float(largest[worst])
        if excess <= 1:
            return None
        return Outcome(1 / excess, self.clipping * excess, self.clipping, parameter=self.indices[worst])


def _unit_norms(tensor: Tensor, dimensions: Sequence[int], dtype: torch.dtype) -> Tensor:
    others = [dimension for dimension in range(tensor.dim()) if dimension not in dimensions]
    if tensor.dim() - 1 in dimensions and not tensor.is_cuda:
        # torch's norm of columns takes a CPU 20 times longer than this.
        return tensor.to(dtype).square().sum(others, keepdim=True).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=others, keepdim=True, dtype=dtype)
    return norms


def _stored(parameter: nn.Parameter) -> Tensor:
    """The elements of a gradient, to be changed in place."""
    found = parameter.grad
    assert found is not None, "a parameter with factors has a gradient"
    if found.layout == torch.sparse_coo:
        parameter.grad = found = found.coalesce()
        return found.values()
    return found
