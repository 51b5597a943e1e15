"""What a residual rule is by name: its options, what is known of it, and how it makes its modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.factors import ScaleOptimizer
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.rule import Rule
from hf_gradguard.registry import Registry

NormOrder = Literal["pre", "post", "none"]


class ResidualPatch(Protocol):
    """One way to join branches to the residual stream: a frozen dataclass whose fields are its options. Make your own
    by deriving from it, or from `MultiplierPatch`."""

    summary: ClassVar[str]
    """One line: the formula and what it is for."""
    citation: ClassVar[str]
    """Authors, year, arXiv number."""
    norm: ClassVar[NormOrder]
    """Where the paper has the norm of a branch: before it, after the addition, or nowhere. What a rule can't do without
    is in `refuse`."""
    unfoldable: ClassVar[str | None] = None
    """Why the rule can't be merged into the weights; None if it can, see `gain`."""

    @property
    def preserving(self) -> bool:
        """With these options, a model's function is the same after patching as before, whatever the model."""
        return False

    def refuse(self, anatomy: Anatomy) -> str | None:
        """Why the rule can't be put on this model, with the remedy; None if it can."""
        return None

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Rule | None]:
        """What `attach` takes: a function that gives the rule for a branch. Of use for one model, once, as what
        branches share is in it.

        Args:
            anatomy: the model's.
        """
        ...

    def hang(self, anatomy: Anatomy) -> None:
        """Puts in place what the rule needs beside its modules on the branches, with hooks that a container holds.

        Args:
            anatomy: the model's, with those modules on it.
        """

    def gain(self, rule: nn.Module) -> Tensor | float | None:
        """What the branch's output weight and bias have to be multiplied with to do without the rule.

        Args:
            rule: one that `make` gave, trained maybe.

        Returns:
            One number, [1], or one for each output feature, [width]; None where the rule has no such equivalent.
        """
        return None

    def optimizer_scaling(self, anatomy: Anatomy) -> ScaleOptimizer | None:
        """What the optimizer's options have to be multiplied with, for each place of the model; None where the rule
        asks nothing of the optimizer. A model with a rule that does is trained with `param_groups` alone.

        Args:
            anatomy: the model's.
        """
        return None


class MultiplierPatch(ResidualPatch, Protocol):
    """A rule whose modules are of the class `Multiplier`."""

    def gain(self, rule: nn.Module) -> Tensor | float:
        """See `ResidualPatch`."""
        assert isinstance(rule, Multiplier), "a multiplier made this"
        return rule.gain.detach().clone() if isinstance(rule.gain, Tensor) else rule.gain


rules: Registry[ResidualPatch] = Registry("residual", absent="none", noun="rule")


def check_finite(**options: float) -> None:
    """Raises ValueError for an option that is not a finite number."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
