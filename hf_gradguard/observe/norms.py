"""The norm of every gradient, in one pass and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard import backends

NO_GRADIENT = -1.0
"""Stands for "got no gradient" in an array of norms."""

# A float32 square below 1.2e-38 loses digits or vanishes. Elements that small can hold more than 1e-7 of the square of
# a norm only if the norm itself is under sqrt(elements) × 3.5e-16.
_UNDERFLOW = 4e-16


class Measurement:
    """The norms of the gradients of some parameters at one moment.

    Making one starts the pass over the gradients and a copy of the result to the host; `norms()` takes delivery. On a
    GPU nothing waits in between: made right after the backward pass, the values have arrived by the time the Trainer
    has looked at the loss, which waits for the device anyway.

    Args:
        parameters: the parameters to measure; those with `.grad` None are noted as having no gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._start([parameter.grad for parameter in parameters])

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Measurement:
        """The same of tensors that are no parameter's `.grad`; None is noted as no gradient."""
        measurement = cls.__new__(cls)
        measurement._start(tensors)
        return measurement

    def _start(self, gradients: Sequence[Tensor | None]) -> None:
        self._size = len(gradients)
        self._present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        self._gradients = [gradient for gradient in gradients if gradient is not None]
        self._versions: list[tuple[int, int]] | None = None
        sizes = np.array([gradient.numel() for gradient in self._gradients], dtype=np.float64)
        self._smallest_sure = np.sqrt(sizes) * _UNDERFLOW
        squares, self.stock_total = backends.squared_norms(self._gradients)
        self._host = HostCopy(squares)
        self._norms: NDArray[np.float64] | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether there was any gradient."""
        return bool(self._present)

    def note_versions(self) -> None:
        """Makes `is_current` able to tell."""
        self._versions = _versions(self._gradients)

    def is_current(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the gradients of these parameters, which were measured, have stayed as they were since
        `note_versions`. Does not wait."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return self._versions == _versions(gradients)

    def norms(self) -> NDArray[np.float64]:
        """The L2 norms, float64 `[parameters]`, right to 1e-6; `NO_GRADIENT` where there is none; not finite where an
        element is not."""
        if self._norms is None:
            found = np.sqrt(self._host.values())
            self._measure_again_where_float32_fails(found)
            self._norms = np.full(self._size, NO_GRADIENT)
            self._norms[self._present] = found
            self._gradients = []
        return self._norms

    def _measure_again_where_float32_fails(self, norms: NDArray[np.float64]) -> None:
        doubtful = np.isinf(norms) | (norms < self._smallest_sure)
        where = self._not_all_zero([int(index) for index in np.flatnonzero(doubtful)])
        if where:
            squares, _ = backends.squared_norms([self._gradients[index] for index in where], precise=True)
            norms[where] = np.sqrt(HostCopy(squares).values())

    def _not_all_zero(self, where: list[int]) -> list[int]:
        """Those of the gradients that hold anything but zeros: layers without any signal are no reason for a second
        pass one by one in every window."""
        if not where:
            return where
        largest = backends.largest_magnitudes([self._gradients[index] for index in where])
        return [index for index, value in zip(where, HostCopy(largest).values(), strict=True) if value != 0]


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    # What autograd itself goes by to notice that a tensor was changed in place; no public name tells it.
    return [(id(tensor), tensor._version) for tensor in tensors]


class HostCopy:
    """A device vector on its way to the host: `values()` waits only if it has not arrived."""

    def __init__(self, vector: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if vector.is_cuda:
            self._buffer = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._buffer.copy_(vector, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(vector.device))
        else:
            self._buffer = vector

    def values(self) -> NDArray[np.float64]:
        """The values, as an array of the vector's shape."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._buffer.numpy()
