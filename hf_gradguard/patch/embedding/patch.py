"""What an embedding patch is by name, and how it gets in front of the first layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import nn

from hf_gradguard.patch.anatomy import Anatomy, Stack
from hf_gradguard.patch.container import CONTAINER, alike, container_of
from hf_gradguard.registry import Registry


class EmbeddingPatch(Protocol):
    """One way to bring the stream into the first layer: a frozen dataclass whose fields are its options."""

    summary: ClassVar[str]
    """One line: the formula and what it is for."""
    citation: ClassVar[str]
    """Authors, year, arXiv number."""
    unfoldable: ClassVar[str | None] = None
    """Why it can't be merged into the embeddings; None if it can, see `fold`."""

    def make(self, stack: Stack) -> nn.Module | None:
        """The module that the stream goes through, [..., width] to [..., width]; None where there is nothing to do.

        Args:
            stack: whose embeddings have their values already (or are on the meta device, while a model is loaded).
        """
        ...

    def fold(self, module: nn.Module) -> float | None:
        """What all embeddings of the stack have to be multiplied with to do without the module that `make` gave."""
        return None


embeddings: Registry[EmbeddingPatch] = Registry("embedding", absent="none", noun="patch")


class Entry(nn.Module):
    """The module that the stream goes through on its way into the first layer.

    Args:
        module: what `EmbeddingPatch.make` gave.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first layer, which gets the stream as its first argument."""
        if args:
            return (self.module(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.module(kwargs["hidden_states"])}


def hang(anatomy: Anatomy, patch: EmbeddingPatch) -> None:
    """Puts a patch in front of the first layer of every stack, in place."""
    for stack in anatomy.stacks:
        module, first = patch.make(stack), stack.layers[0]
        if module is not None:
            container = container_of(first.module)
            entry = Entry(alike(module, first.branches[0].output.weight))
            container.add_module("embedding", entry.train(first.module.training))
            container.hold(first.module.register_forward_pre_hook(entry.before_layer, with_kwargs=True))


def hung(anatomy: Anatomy) -> Iterator[tuple[Stack, nn.Module]]:
    """The stacks that have a patch in front of them, each with the module that `EmbeddingPatch.make` gave."""
    for stack in anatomy.stacks:
        entry = getattr(getattr(stack.layers[0].module, CONTAINER, None), "embedding", None)
        if entry is not None:
            yield stack, entry.module
