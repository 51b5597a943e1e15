"""Weights and modules at the places that an entry names, to read and to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, eq=False)
class Slot:
    """An attribute of a module that can be read and replaced: a norm, an activation."""

    owner: nn.Module
    """The module that has the attribute."""
    name: str
    """The attribute."""

    @property
    def value(self) -> Any:
        """What is there now: a module, or a function where the config gave one as activation."""
        return getattr(self.owner, self.name)

    def replace(self, value: Any) -> None:
        """Puts something else there."""
        setattr(self.owner, self.name, value)


@dataclass(frozen=True, eq=False)
class Part:
    """A linear map of a branch: a whole nn.Linear or Conv1D, or some output features of one.

    Always seen as [out_features, in_features] of this part alone, whatever the orientation of the weight and whatever
    else lies in it, so that an initialisation computes its fans from `shape` and need not know:

        >>> module = Conv1D(3 * 4, 8)                                # GPT-2's query, key and value
        >>> value = Part(module, groups=1, start=8, length=4)
        >>> value.shape, module.weight.shape
        ((4, 8), torch.Size([8, 12]))
        >>> value.write(nn.init.xavier_uniform_(torch.empty(value.shape)))
    """

    module: nn.Module
    """The module that owns weight and bias; under PEFT the one below the adapter."""
    groups: int
    """In how many equal groups the output features lie, this part having `length` of each: heads, or 1."""
    start: int
    """Where this part begins in each group."""
    length: int
    """How many features of each group belong to it."""

    @property
    def weight(self) -> nn.Parameter:
        """The whole parameter: [out, in] of an nn.Linear, [in, out] of a Conv1D."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The whole bias [out], None where the module has none."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """The weight is [in, out]."""
        return isinstance(self.module, Conv1D)

    @property
    def out_features(self) -> int:
        """Number of output features of this part: its fan-out."""
        return self.groups * self.length

    @property
    def in_features(self) -> int:
        """Number of input features: its fan-in."""
        return self.weight.shape[0 if self.is_transposed else 1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def read(self) -> Tensor:
        """A copy of this part's weight, [out_features, in_features], without gradient."""
        weight = self._oriented(self.weight.detach())
        return self._own(weight).reshape(self.shape).clone()

    def write(self, values: Tensor) -> None:
        """Overwrites this part's weight with values [out_features, in_features]; what else lies in the weight stays."""
        own = self._own(self._oriented(self.weight.detach()))
        own.copy_(values.detach().reshape(own.shape))

    def read_bias(self) -> Tensor | None:
        """A copy of this part's bias [out_features], without gradient; None where there is none."""
        return None if self.bias is None else self._own(self.bias.detach()).reshape(-1).clone()

    def write_bias(self, values: Tensor | float) -> None:
        """Overwrites this part's bias with values [out_features] or one number; does nothing where there is none."""
        if self.bias is not None:
            own = self._own(self.bias.detach())
            own.copy_(torch.as_tensor(values).detach().expand(self.out_features).reshape(own.shape))

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.is_transposed else weight

    def _own(self, tensor: Tensor) -> Tensor:
        """A view of this part of a tensor whose first axis is the output features: [groups, length, …]."""
        return tensor.view(self.groups, -1, *tensor.shape[1:]).narrow(1, self.start, self.length)


def below_adapters(module: nn.Module) -> nn.Module:
    """The module that PEFT put an adapter around, or the module itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
