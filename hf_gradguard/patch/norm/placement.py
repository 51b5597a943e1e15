"""What a conversion of norms is by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.registry import Registry


@dataclass(frozen=True)
class Placement:
    """Where norms act in a model, whatever they did in it before."""

    own: Literal["input", "sum", "off"]
    """The norm that each branch has in the unpatched model: before the branch (`input`), on what the addition gives
    (`sum`), or nowhere (`off`). Its weights stay where they are."""
    output: bool
    """Whether the output of each branch gets a norm, a new one, before it is added."""
    final: bool
    """Whether there is a norm after the last layer: the model's own, or a new one where it has none."""

    @property
    def position(self) -> Literal["pre", "post", "none"]:
        """`own`, as `Branch.norm_position` calls it."""
        positions: dict[str, Literal["pre", "post", "none"]] = {"input": "pre", "sum": "post", "off": "none"}
        return positions[self.own]


class NormPatch(Protocol):
    """One way to place the norms: a frozen dataclass whose fields are its options."""

    summary: ClassVar[str]
    """One line: the formula and what it is for."""
    citation: ClassVar[str]
    """Authors, year, arXiv number."""

    @property
    def placement(self) -> Placement:
        """Where norms are to act."""
        ...

    def changes(self, anatomy: Anatomy) -> bool:
        """Whether the model's function becomes another one: not where its norms act like that already."""
        positions = all(branch.norm_position == self.placement.position for branch in anatomy.branches)
        finals = all((stack.final_norm is not None) == self.placement.final for stack in anatomy.stacks)
        return not (positions and finals) or self.placement.output

    def refuse(self, anatomy: Anatomy) -> str | None:
        """Why the norms of this model can't be placed so, with the remedy; None if they can."""
        parallel = next((branch for branch in anatomy.branches if branch.parallel), None)
        if self.placement.own == "sum" and parallel is not None:
            return (
                f"norm={norms.text(self)!r} needs a norm on each addition, but {parallel} in this "
                f"{anatomy.model.config.model_type} model is added together with another (parallel residual), and each "
                "has a norm of its own; use norm='pre', 'sandwich' or 'none'"
            )
        return None


norms: Registry[NormPatch] = Registry("norm", noun="placement")
