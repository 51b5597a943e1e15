"""What is done to the features of each head, behind the linear map that makes queries or keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.patch.anatomy import Anatomy, Branch, Layer, Stack
from hf_gradguard.patch.container import alike, container_of
from hf_gradguard.patch.entry import AttentionEntry, Projection
from hf_gradguard.patch.parts import Part


class PerHead(nn.Module):
    """The hook behind a linear map that gives, maybe among other things, the features of heads.

    Args:
        change: what is done to each head's features, [..., heads, width] to the same.
        part: which output features of the linear map they are.
        width: features of one head.
    """

    def __init__(self, change: nn.Module, part: Part, width: int) -> None:
        super().__init__()
        self.change = change
        self.groups = part.groups
        self.start = part.start
        self.length = part.length
        self.width = width

    def after_projection(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the linear map, whose output is [..., out_features]."""
        size = output.shape[-1] // self.groups
        groups = output.view(*output.shape[:-1], self.groups, size)
        own = groups.narrow(-1, self.start, self.length)
        heads = own.reshape(*own.shape[:-1], self.length // self.width, self.width)
        changed: Tensor = self.change(heads).flatten(-2).to(output.dtype)
        if self.length < size:
            changed = torch.cat((groups[..., : self.start], changed, groups[..., self.start + self.length :]), -1)
        return changed.flatten(-2)


def attention_branches(anatomy: Anatomy) -> Iterator[tuple[Stack, Layer, Branch]]:
    """All branches with attention, in depth order, and where they are."""
    for stack in anatomy.stacks:
        for layer in stack.layers:
            yield from ((stack, layer, branch) for branch in layer.branches if branch.query is not None)


def head_width(anatomy: Anatomy, stack: Stack, branch: Branch) -> int:
    """Features of one head's query and key, the same for all heads. Keys may have fewer heads (grouped queries).

    Raises:
        ValueError: the config does not say how many heads there are, or queries or keys can't be cut into heads.
    """
    config: Any = anatomy.model.config
    heads = getattr(config, f"{stack.name}_attention_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"{type(config).__name__} has no num_attention_heads, which the {branch} needs")
    assert branch.query is not None, "it is attention"
    assert branch.key is not None, "it is attention"
    width = branch.query.out_features // heads
    for name, part in (("queries", branch.query), ("keys", branch.key)):
        if width == 0 or part.length % width:
            raise ValueError(f"the {part.length} features of {name} in the {branch} can't be cut into {heads} heads")
    return width


def refuse(anatomy: Anatomy, name: str, why: str) -> str | None:
    """Why nothing can be done to heads in this model; None if it can.

    Args:
        anatomy: the model's.
        name: what is to be done, as the configuration calls it.
        why: what becomes of that in a model which normalises queries and keys itself.
    """
    for stack, layer, branch in attention_branches(anatomy):
        for child, _ in attention_module(layer, branch).named_children():
            if "norm" in child.lower():
                return (
                    f"attention={name!r} {why}: the {branch} in this {anatomy.model.config.model_type} model "
                    f"normalises queries and keys itself ({child}); leave it out"
                )
        try:
            head_width(anatomy, stack, branch)
        except ValueError as error:
            return f"attention={name!r}: {error}"
    return None


def attention_module(layer: Layer, branch: Branch) -> nn.Module:
    """The module that a branch's query projection is a child of."""
    return layer.module.get_submodule(_path(_entry(branch).query).rpartition(".")[0])


def hang(layer: Layer, branch: Branch, role: str, change: nn.Module, width: int) -> None:
    """Puts something behind the query or key projection of a branch.

    Args:
        layer: the branch's.
        branch: one with attention.
        role: `query` or `key`.
        change: what is done to each head's features.
        width: features of one head.
    """
    part: Part = getattr(branch, role)
    container, per_head = container_of(layer.module), PerHead(alike(change, part.weight), part, width)
    container.add_module(f"{branch.kind}_{role}", per_head.train(layer.module.training))
    container.after(layer.module, _path(getattr(_entry(branch), role)), per_head.after_projection)


def _entry(branch: Branch) -> AttentionEntry:
    assert isinstance(branch.entry, AttentionEntry), "it is attention"
    return branch.entry


def _path(projection: Projection) -> str:
    return projection if isinstance(projection, str) else projection.module
