"""What tensors hold, in numbers for a message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_gradguard.backends.dtensor import local_part

_DESCRIBED = 4
"""So many tensors of one call are described in a message."""


@dataclass(frozen=True)
class Range:
    """The values of one tensor, in numbers for a message."""

    name: str
    kind: str
    """Its dtype and shape."""
    low: float
    high: float
    """Smallest and largest finite element; NaN where there is none."""
    size: int
    nan: int = 0
    infinite: int = 0
    minus_infinite: int = 0
    """How many of the infinite ones are negative."""

    @property
    def is_finite(self) -> bool:
        return not self.nan and not self.infinite

    @property
    def is_like_mask(self) -> bool:
        """Whether −infinity is the only non-finite value."""
        return not self.nan and 0 < self.infinite == self.minus_infinite

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        bad = [f"{count} of {self.size} elements {what}" for count, what in counts if count]
        parts = [] if math.isnan(self.low) else [f"between {self.low:.3g} and {self.high:.3g}"]
        return f"{name}{' with '.join([*parts, ' and '.join(bad)] if bad else parts)} ({self.kind})"


def measure(name: str, tensor: Tensor) -> Range | None:
    """The range of a tensor; None for what has none: empty, boolean, on no device, of a kind without order."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    try:
        values = _plain(tensor)
        if values.numel() == 0 or values.dtype == torch.bool or values.is_meta:
            return None
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if math.isfinite(low) and math.isfinite(high):
            return Range(name, kind, low, high, values.numel())
        counts = torch.stack([values.isnan().sum(), values.isinf().sum(), values.isneginf().sum()]).tolist()
        finite = values[values.isfinite()]
        low, high = torch.stack(torch.aminmax(finite)).tolist() if finite.numel() else (math.nan, math.nan)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    return Range(name, kind, low, high, values.numel(), *counts)


def _plain(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in a form that can be compared."""
    values = local_part(tensor.detach())
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.layout == torch.sparse_coo else values.values()
    if values.is_complex():
        return torch.view_as_real(values)
    return values.float() if values.is_floating_point() and values.itemsize == 1 else values


def faults(ranges: Iterable[Range]) -> str:
    """What of the non-finite is among them."""
    ranges = list(ranges)
    kinds = (("NaN", any(one.nan for one in ranges)), ("infinity", any(one.infinite for one in ranges)))
    return " and ".join(name for name, is_there in kinds if is_there)


def listed(ranges: Sequence[Range]) -> str:
    if len(ranges) == 1:
        return str(replace(ranges[0], name=""))
    more = f" and {len(ranges) - _DESCRIBED} more" if len(ranges) > _DESCRIBED else ""
    return ", ".join(map(str, ranges[:_DESCRIBED])) + more


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested argument or output consists of, with dotted names."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(part.name, getattr(value, part.name)) for part in fields(value)]
    else:
        yield name, value
        return
    for key, item in items:
        yield from leaves(item, f"{name}.{key}" if name else str(key))


Measured = list[tuple[Tensor, Range]]


def measured(value: Any) -> Measured:
    """All that can be measured of a nested argument or output."""
    tensors = [(name, leaf) for name, leaf in leaves(value) if isinstance(leaf, Tensor)]
    pairs = [(tensor, measure(name, tensor)) for name, tensor in tensors]
    return [(tensor, found) for tensor, found in pairs if found is not None]
