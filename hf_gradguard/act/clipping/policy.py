"""What a clipping rule is, and what it gives: by how much to multiply which gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.backends.dtensor import local_part
from hf_gradguard.registry import Registry


@dataclass(frozen=True)
class Outcome:
    """What a clip did, for events and the record."""

    coefficient: float
    """The smallest factor that a gradient was multiplied with, below 1."""
    value: float
    """The number that was too large: the norm of the whole gradient, or of the part that was reduced most."""
    threshold: float
    """What it was held against."""
    parameter: int | None = None
    """Index of the parameter that was reduced most, for rules that clip one by one."""
    group: int | None = None
    """Index in `Layout.groups` of the layer that was reduced most, for rules that clip layer by layer."""


class Clip(Protocol):
    """One decision to clip."""

    @property
    def factors(self) -> Sequence[float] | Sequence[Tensor | None]:
        """What to multiply each parameter's gradient with `[P]`."""

    def apply(self, gradient: Gradient) -> None:
        """Multiplies what is to be clipped, in place, and touches nothing else. Does not wait for the device.

        Args:
            gradient: the one that the decision is about.
        """

    def outcome(self) -> Outcome | None:
        """What came of it; None if nothing was too large after all. May wait for the device: call it when the
        optimizer has made its step. Can be called without `apply`."""


@dataclass(frozen=True)
class HostClip:
    """A clip whose factors are known on the host."""

    factors: Sequence[float]
    """`[P]`; gradients with a factor of 1 are left alone."""
    found: Outcome

    @classmethod
    def whole(cls, gradient: Gradient, threshold: float, *, epsilon: float = 0.0) -> HostClip | None:
        """All gradients by one coefficient, threshold ÷ (total norm + epsilon); None where that is not below 1."""
        coefficient = threshold / (gradient.total_norm + epsilon)
        if coefficient >= 1:
            return None
        return cls([coefficient] * len(gradient.names), Outcome(coefficient, gradient.total_norm, threshold))

    @torch.no_grad()
    def apply(self, gradient: Gradient) -> None:
        """See `Clip`. Of a sharded gradient this process's part is multiplied."""
        gradients, factors = [], []
        for parameter, factor in zip(gradient.parameters, self.factors, strict=True):
            if factor < 1 and parameter.grad is not None:
                found = local_part(parameter.grad)
                if found.itemsize < 4 and not found.is_cuda:
                    found.mul_(factor)  # on a CPU `_foreach_mul_` would round the factor itself to 16 bits
                else:
                    gradients.append(found)
                    factors.append(factor)
        if gradients:
            torch._foreach_mul_(gradients, factors)

    def outcome(self) -> Outcome | None:
        """See `Clip`."""
        return self.found


class ClipPolicy(Protocol):
    """A clipping rule: a dataclass whose init fields are its options and whose other fields are its state. Make your
    own by deriving from it."""

    def clip(self, gradient: Gradient) -> Clip | None:
        """Decides about one gradient, and takes it into the rule's statistics.

        Returns:
            What to multiply with, or None where nothing is clipped.
        """
        ...

    def refuse(self, parameters: Sequence[nn.Parameter]) -> str | None:
        """Why the rule can't work with such parameters; None if it can."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values; nothing, unless a rule remembers something."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; every later decision is then the same to the last bit."""


policies: Registry[ClipPolicy] = Registry("clip", absent="trainer")
