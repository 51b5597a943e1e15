"""Which layer each parameter belongs to, as plain data: written into records, and read where there is no model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

EMBEDDINGS = "embeddings"
LAYER = "layer"
FINAL_NORM = "final_norm"
HEAD = "head"
ATTENTION = "attention"
MLP = "mlp"


@dataclass(frozen=True)
class Group:
    """One point on the depth axis: the parameters that are read together."""

    name: str
    """As people read it: `embeddings`, `layer 7`, `decoder layer 3`, `final norm`, `head`."""
    kind: str
    """`embeddings`, `layer`, `final_norm` or `head`."""
    stack: str = ""
    """Which stack of layers it belongs to (`encoder`, `decoder` …); empty where the model has only one."""
    depth: int | None = None
    """Index within the stack, from 0 at the input; None unless `kind` is `layer`."""


@dataclass(frozen=True)
class ParameterInfo:
    """One trainable parameter. A tied one is listed once, with its other names as aliases."""

    name: str
    """The first of its names in `named_parameters()`, without what DDP and `torch.compile` put in."""
    group: int
    """Index into `Layout.groups`."""
    part: str | None
    """`attention` or `mlp` inside a layer of a model that has attention; None elsewhere."""
    shape: tuple[int, ...]
    """Full shape, also where the parameter is sharded."""
    dtype: str
    """`float32`, `bfloat16` …"""
    aliases: tuple[str, ...] = ()
    """The other names of a tied parameter."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The trainable parameters of a model and the groups they form, in depth order."""

    groups: tuple[Group, ...]
    """Embeddings, layers and final norm of each stack, head. Every group owns at least one trainable parameter."""
    parameters: tuple[ParameterInfo, ...]
    """In the order of `named_parameters()`."""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Indices of the groups that are layers, in depth order, an encoder's before its decoder's."""
        return tuple(index for index, group in enumerate(self.groups) if group.kind == LAYER)

    @cached_property
    def group_of(self) -> np.ndarray:
        """Index of each parameter's group, int64 `[parameters]`."""
        return np.array([info.group for info in self.parameters], dtype=np.int64)

    def group_squares(self, squares: np.ndarray) -> np.ndarray:
        """Sum within each group: `[..., parameters]` → float64 `[..., groups]`. One NaN makes its group NaN.

        Raises:
            ValueError: the last axis does not have one entry a parameter.
        """
        if squares.shape[-1] != len(self.parameters):
            raise ValueError(
                f"squares have {squares.shape[-1]} entries on the last axis, the layout has {len(self.parameters)} "
                "parameters; pass one entry a parameter, in the order of layout.parameters"
            )
        order, starts = self._runs
        return np.add.reduceat(squares[..., order].astype(np.float64), starts, axis=-1)

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """An order in which each group's parameters stand together, and where each group begins in it."""
        order = np.argsort(self.group_of, kind="stable")
        return order, np.searchsorted(self.group_of[order], np.arange(len(self.groups)))

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """The layout that `to_dict` wrote, also after a way through JSON."""
        return cls(
            groups=tuple(Group(**group) for group in values["groups"]),
            parameters=tuple(
                ParameterInfo(**{**info, "shape": tuple(info["shape"]), "aliases": tuple(info["aliases"])})
                for info in values["parameters"]
            ),
        )
