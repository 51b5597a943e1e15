"""Rows of several lengths: each is read as the text that it holds, wherever its padding stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a batch are, and how to bring them to the left of their rows and back."""

    real: Tensor
    """Whether a place holds a token, bool `[batch, steps]`."""
    order: Tensor
    """Places of each row, those with a token first, otherwise in order: int64 `[batch, steps]`."""
    lengths: Tensor
    """Tokens in each row, int64 `[batch]`, on the CPU."""

    @cached_property
    def places(self) -> Tensor:
        """Where in `order` each place stands, int64 `[batch, steps]`."""
        return self.order.argsort(dim=1)

    def to_left(self, values: Tensor) -> Tensor:
        """`[batch, steps, width]` with each row's tokens moved to its left end."""
        return values.gather(1, self.order.unsqueeze(-1).expand_as(values))

    def back(self, values: Tensor) -> Tensor:
        """What `to_left` moved, each at its place again, and zeros where there is padding."""
        moved = values.gather(1, self.places.unsqueeze(-1).expand_as(values))
        return moved.masked_fill(~self.real.unsqueeze(-1), 0)


def find_padding(attention_mask: Tensor | None, batch: int, steps: int, past: int = 0) -> Padding | None:
    """The padding that a mask tells of, or None where there is none.

    Args:
        attention_mask: not zero where there is a token, `[batch, steps]` or `[batch, past + steps]`.
        batch: rows that are read.
        steps: places of each row that are read.
        past: places that have been read before.

    Raises:
        ValueError: it has another shape.
    """
    if attention_mask is None:
        return None
    shapes = [[batch, steps], [batch, past + steps]]
    if list(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; a recurrent model takes one entry a token, "
            f"{shapes[0]} here" + (f", or {shapes[1]} with those of past_key_values" if past else "")
        )
    real = attention_mask[:, -steps:] != 0
    if bool(real.all()):
        return None
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return Padding(real, order, real.sum(dim=1).cpu())
