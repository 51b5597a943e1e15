"""Norms of ordinary tensors: one pass over each, right to 1e-6 at any size.

A float32 norm over a whole tensor drifts on a CPU, because one running sum takes in too many squares: −2.7e-3 at
GPT-2's embedding of 38.6 million elements, and 1e-5 at 16 thousand elements of one value. So large tensors are measured
in rows of 256, which are added up in float64 (within 3e-7 whatever the values, and as fast), tensors of a few rows in
float64, and only those of at most two rows in float32. A GPU adds up in a tree and needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    dense = [gradient if gradient.layout == torch.strided else _values(gradient) for gradient in gradients]
    if precise:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in dense]
        return _gather(norms).square_(), None
    if _is_one_gpu(dense):
        norms = list(torch._foreach_norm(dense, 2, torch.float32))
        stacked = torch.stack(norms)
        # This is how torch's own `get_total_norm` ends, so that a clip by this total is the Trainer's to the bit.
        stock_total = torch.linalg.vector_norm(stacked) if dense[0].dtype == torch.float32 else None
        return stacked.double().square_(), stock_total
    tiny: list[int] = []
    larger: list[int] = []
    for index, gradient in enumerate(dense):
        (tiny if gradient.numel() <= TINY and gradient.dtype != torch.float64 else larger).append(index)
    parts = [gradient if gradient.numel() <= SMALL else _row_norms(_values(gradient)) for gradient in dense]
    squares = torch.empty(len(dense), dtype=torch.float64, device=dense[0].device)
    for where, dtype in ((tiny, torch.float32), (larger, torch.float64)):
        if where:
            found = torch._foreach_norm([parts[index] for index in where], 2, dtype)
            squares[where] = _gather(list(found)).to(squares)
    return squares.square_(), None


def _is_one_gpu(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].is_cuda and len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1


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
    device = norms[0].device
    if all(norm.device == device for norm in norms):
        return torch.stack(list(norms))
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms])
