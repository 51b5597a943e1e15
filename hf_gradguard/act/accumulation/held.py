"""The gradient that is held back: one buffer, to which windows are added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard.backends.dtensor import is_sharded, local_part
from hf_gradguard.observe.norms import Measurement

_HALVES = (torch.float16, torch.bfloat16)
# Between the name of a parameter and the part of its sparse gradient.
_INDICES = ":indices"
_VALUES = ":values"


class HeldGradients:
    """A weighted sum of gradients, kept apart from `.grad`.

    Its memory is one copy of the gradients, made when they are first held and used again for every update: float32 for
    gradients of 16 bits, so that many small windows don't get lost in a large sum, else of the gradient's own dtype.
    Sharded gradients are held as their local shards, sparse ones stay sparse. `.grad` is copied from and into, never
    kept: under DDP it may be a view of a communication bucket.

    Args:
        parameters: whose gradients to hold.
        names: of these parameters, for saving.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> None:
        self._parameters = list(parameters)
        self._names = list(names)
        self._buffers: list[Tensor | None] = [None] * len(self._parameters)
        self._filled = [False] * len(self._parameters)

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Adds `weight` × `.grad` of each parameter that has one."""
        fresh: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            gradient = _placed_as(parameter, parameter.grad)
            buffer = self._buffers[index]
            if gradient.is_sparse or (buffer is not None and buffer.is_sparse):
                self._add_sparse(index, gradient, weight)
            elif self._filled[index]:
                assert buffer is not None
                more.append((buffer, gradient))
            else:
                fresh.append((self._dense_buffer(index, gradient), gradient))
        for buffers, gradients in _batches(fresh):
            torch._foreach_copy_(buffers, gradients)
            if weight != 1:
                torch._foreach_mul_(buffers, weight)
        for buffers, gradients in _batches(more):
            torch._foreach_add_(buffers, gradients, alpha=weight)

    def norms(self) -> NDArray[np.float64]:
        """L2 norms of what is held `[parameters]`, right to 1e-6; `NO_GRADIENT` where there is nothing. With sharded
        parameters a collective: call it on every rank."""
        return Measurement.of([buffer if filled else None for buffer, filled in self._slots()]).norms()

    @torch.no_grad()
    def release(self, scale: float) -> None:
        """Writes `scale` × what is held into `.grad`, None where nothing is, and is empty afterwards."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for parameter, (buffer, filled) in zip(self._parameters, self._slots(), strict=True):
            if buffer is None or not filled:
                parameter.grad = None
            elif buffer.is_sparse:
                parameter.grad = (buffer * scale).to(parameter.dtype)
            else:
                if parameter.grad is None or not _is_stored_alike(buffer, parameter.grad):
                    parameter.grad = torch.empty_like(parameter)
                pairs.append((buffer, parameter.grad))
        for buffers, gradients in _batches(pairs):
            if scale != 1:
                torch._foreach_mul_(buffers, scale)
            torch._foreach_copy_(gradients, buffers)
        self.clear()

    def clear(self) -> None:
        """Forgets what is held; the memory is kept for the next update."""
        self._filled = [False] * len(self._parameters)
        self._buffers = [None if buffer is None or buffer.is_sparse else buffer for buffer in self._buffers]

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name, for saving: of sharded gradients this process's part, of sparse ones the indices and
        the values. Not copies: save them before the next window."""
        found: dict[str, Tensor] = {}
        for name, (buffer, filled) in zip(self._names, self._slots(), strict=True):
            if buffer is None or not filled:
                continue
            if buffer.is_sparse:
                found[name + _INDICES] = buffer.indices()
                found[name + _VALUES] = buffer.values()
            else:
                found[name] = local_part(buffer).contiguous()
        return found

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some saved tensors that belong to these parameters."""
        names = set(self._names)
        return {
            key: saved for key, saved in tensors.items() if key.removesuffix(_INDICES).removesuffix(_VALUES) in names
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Holds what `tensors` gave, and nothing else.

        Raises:
            ValueError: a tensor belongs to no parameter, or has another shape than this process's part of it.
        """
        self.clear()
        places = {name: index for index, name in enumerate(self._names)}
        for key, saved in tensors.items():
            name = key.removesuffix(_INDICES).removesuffix(_VALUES)
            if name not in places:
                raise ValueError(
                    f"a gradient is held in the checkpoint for {name!r}, which is no trainable parameter here; resume "
                    "with the model that was saved, or without its held gradients"
                )
            index = places[name]
            if key.endswith(_INDICES):
                self._load_sparse(index, saved, tensors[name + _VALUES])
            elif not key.endswith(_VALUES):
                self._load_dense(index, saved)

    def _load_dense(self, index: int, saved: Tensor) -> None:
        buffer = torch.empty_like(self._parameters[index], dtype=saved.dtype)
        if local_part(buffer).shape != saved.shape:
            raise ValueError(
                f"the held gradient of {self._names[index]!r} has shape {tuple(saved.shape)} in the checkpoint and "
                f"{tuple(local_part(buffer).shape)} here; resume with the same model on as many processes, or without "
                "its held gradients"
            )
        local_part(buffer).copy_(saved)
        self._buffers[index], self._filled[index] = buffer, True

    def _load_sparse(self, index: int, indices: Tensor, values: Tensor) -> None:
        parameter = self._parameters[index]
        sparse = torch.sparse_coo_tensor(
            indices, values, parameter.shape, device=parameter.device, check_invariants=True
        )
        self._buffers[index], self._filled[index] = sparse.coalesce(), True

    def _slots(self) -> Iterator[tuple[Tensor | None, bool]]:
        return zip(self._buffers, self._filled, strict=True)

    def _dense_buffer(self, index: int, gradient: Tensor) -> Tensor:
        buffer = self._buffers[index]
        if buffer is None:
            buffer = torch.empty_like(gradient, dtype=_held_dtype(gradient.dtype))
            self._buffers[index] = buffer
        self._filled[index] = True
        return buffer

    def _add_sparse(self, index: int, gradient: Tensor, weight: float) -> None:
        total = gradient.to(_held_dtype(gradient.dtype)) * weight
        buffer = self._buffers[index]
        if buffer is not None and self._filled[index]:
            # torch adds a sparse tensor to a dense one, but not the other way round.
            total = total + buffer if buffer.is_sparse else buffer + total
        self._buffers[index] = total.coalesce() if total.is_sparse else total
        self._filled[index] = True


def _held_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALVES else dtype


def _placed_as(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """The gradient, split over processes as its parameter is: a DTensor's may still be a partial sum."""
    if is_sharded(gradient) and not _is_stored_alike(parameter, gradient):
        placed: Tensor = gradient.redistribute(placements=_placements(parameter))  # type: ignore[attr-defined]
        return placed
    return gradient


def _is_stored_alike(one: Tensor, other: Tensor) -> bool:
    return one.is_sparse == other.is_sparse and _placements(one) == _placements(other)


def _placements(tensor: Tensor) -> Any:
    return tensor.placements if is_sharded(tensor) else None  # type: ignore[attr-defined]


def _batches(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Local parts of the pairs, in lists of one device and dtype, which is what torch's foreach is fast with."""
    batches: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for pair in pairs:
        left, right = map(local_part, pair)
        lefts, rights = batches[right.device, left.dtype, right.dtype]
        lefts.append(left)
        rights.append(right)
    yield from batches.values()
