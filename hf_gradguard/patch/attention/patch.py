"""What an attention patch is by name."""

from __future__ import annotations

from typing import ClassVar, Protocol

from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.registry import Registry


class AttentionPatch(Protocol):
    """One change inside every attention branch: a frozen dataclass whose fields are its options."""

    summary: ClassVar[str]
    """One line: the formula and what it is for."""
    citation: ClassVar[str]
    """Authors, year, arXiv number."""
    unfoldable: ClassVar[str | None] = None
    """Why it can't be merged into the weights; None if it can."""

    @property
    def preserving(self) -> bool:
        """With these options, a model's function is the same after patching as before, whatever the model."""
        return False

    def refuse(self, anatomy: Anatomy) -> str | None:
        """Why it can't be put on this model, with the remedy; None if it can."""
        return None

    def hang(self, anatomy: Anatomy) -> None:
        """Puts it on every attention branch, in place: modules into the layers' containers, and their hooks."""
        ...

    def fold(self, anatomy: Anatomy) -> None:
        """Merges it into the weights, in place and without gradient, so that they do without what `hang` has put there.
        Not called where `unfoldable` says why that can't be."""


attentions: Registry[AttentionPatch] = Registry("attention", absent="none", noun="patch")
