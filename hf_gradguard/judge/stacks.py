"""Which layers follow one another: a model is judged stack by stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_gradguard.observe.layout import Layout


@dataclass(frozen=True)
class Stack:
    """Layers that the signal passes one after another: a decoder-only model has one stack, T5 has two.

    Depth means something within a stack only: an encoder gets its gradient through the decoder's cross-attention, so
    that its last layer may well get a tenth of what the decoder's first gets, in perfect health.
    """

    name: str
    """What tells it from the model's other stacks ("encoder"); empty where there is one."""
    columns: tuple[int, ...]
    """Where its layers are in a reading of all layers, from the input up; at least one."""
    layers: tuple[str, ...]
    """Its layers' names, as many as columns."""

    def __post_init__(self) -> None:
        if not self.columns or len(self.columns) != len(self.layers):
            raise ValueError(
                f"stack {self.name!r} has {len(self.columns)} columns and {len(self.layers)} layer names; "
                "give one name for each column, and at least one"
            )

    @classmethod
    def of_depth(cls, layers: int) -> Stack:
        """The only stack of a model with so many layers."""
        return cls("", tuple(range(layers)), tuple(f"layer {index}" for index in range(layers)))


def stacks_of(layout: Layout) -> tuple[Stack, ...]:
    """The stacks of a model; columns are places in `layout.layers`, the order of `Reading.layer_norms()`."""
    columns: dict[str, list[int]] = {}
    for column, index in enumerate(layout.layers):
        columns.setdefault(layout.groups[index].stack, []).append(column)
    return tuple(
        Stack(name, tuple(found), tuple(layout.groups[layout.layers[column]].name for column in found))
        for name, found in columns.items()
    )
