"""Norms of ordinary tensors: one pass over each, right to 1e-6 at any size.

A float32 norm over a whole tensor drifts on a CPU, because one running sum takes in too many squares: −2.7e-3 at
GPT-2's embedding of 38.6 million elements, and 1e-5 at 16 thousand elements of one value. So large tensors are measured
in rows of 256, which are added up in float64 (within 3e-7 whatever the values, and as fast), tensors of a few rows in
float64, and only those of at most two rows in float32. A GPU adds up in a tree and needs none of this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROW = 256
"""Elements in a row of a large tensor."""
TINY = 2 * ROW
"""Tensors up to this many elements are measured in float32."""
SMALL = 64 * ROW
"""Tensors up to this many elements are measured whole, in float64."""


def squared_norms(gradients: Sequence[Tensor], *, precise: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `hf_gradguard.backends.squared_norms`, of which this is the part for ordinary tensors."""
    kinds = {(gradient.device, gradient.dtype, gradient.layout) for gradient in gradients}
    if any(dtype.is_complex for _, dtype, _ in kinds):
        return squared_norms([torch.view_as_real(g) if g.is_complex() else g for g in gradients], precise=precise)
    if any(layout != torch.strided for _, _, layout in kinds):
        gradients = [gradient if gradient.layout == torch.strided else _values(gradient) for gradient in gradients]
    if precise:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        return _gather(norms).square_(), None
    if len(kinds) == 1 and gradients[0].is_cuda:
        stacked = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float32))
        # This is how torch's own `get_total_norm` ends, so that a clip by this total is the Trainer's to the bit.
        stock_total = torch.linalg.vector_norm(stacked) if gradients[0].dtype == torch.float32 else None
        return stacked.double().square_(), stock_total
    sizes = np.array([gradient.numel() for gradient in gradients])
    tiny = sizes <= TINY
    if any(dtype == torch.float64 for _, dtype, _ in kinds):
        tiny &= np.array([gradient.dtype != torch.float64 for gradient in gradients])
    parts = list(gradients)
    for index in np.flatnonzero(sizes > SMALL):
        parts[index] = _row_norms(_values(parts[index]))
    squares = torch.empty(len(parts), dtype=torch.float64, device=parts[0].device)
    for chosen, dtype in ((tiny, torch.float32), (~tiny, torch.float64)):
        if chosen.any():
            found = torch._foreach_norm(list(itertools.compress(parts, chosen)), 2, dtype)
            squares[torch.from_numpy(chosen)] = _gather(found).to(squares)
    return squares.square_(), None


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """See `hf_gradguard.backends.largest_magnitudes`, of which this is the part for ordinary tensors."""
    values = [tensor if tensor.layout == torch.strided else _values(tensor) for tensor in tensors]
    return _gather([torch.linalg.vector_norm(value, math.inf).double() for value in values])


def _row_norms(values: Tensor) -> Tensor:
    """L2 norms of the rows of a flat tensor, and of what is left over."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    whole = values.numel() // ROW * ROW
    norms: Tensor = torch.linalg.vector_norm(values[:whole].view(-1, ROW), dim=1, dtype=dtype)
    if whole == values.numel():
        return norms
    return torch.cat([norms, torch.linalg.vector_norm(values[whole:], dtype=dtype)[None]])


def _values(gradient: Tensor) -> Tensor:
    """The elements that a gradient stores, flat; duplicates in a sparse one are added up first."""
    if gradient.layout == torch.sparse_coo:
        gradient = gradient.coalesce().values()
    return gradient.reshape(-1)


def _gather(norms: Sequence[Tensor]) -> Tensor:
    """Scalars as one vector on the device of the first."""
    try:
        return torch.stack(list(norms))
    except RuntimeError:  # on several devices
        return torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms])
