"""Where the gradients live. The only code that knows how a gradient is stored: plain tensor or shard of a DTensor.

One function for everybody else, `squared_norms`; a further kind of storage is one more module and one line here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradguard.backends import dtensor, plain

__all__ = ["largest_magnitudes", "squared_norms"]


@torch.no_grad()
def squared_norms(gradients: Sequence[Tensor], *, precise: bool = False) -> tuple[Tensor, Tensor | None]:
    """Squared L2 norm of each gradient, as one process that holds all of it would compute it.

    Args:
        gradients: dense, sparse or sharded tensors of any floating dtype, on any devices.
        precise: accumulate everything in float64. Slow (about 20 times); for the rare tensor whose float32 squares
            overflow or underflow.

    Returns:
        The squares, float64 `[len(gradients)]`, on the device of the first gradient; and the total norm that torch's
        own clipping would find, bit for bit, where this pass has computed the very same thing (on a GPU), else None.
    """
    if not gradients:
        return torch.zeros(0, dtype=torch.float64), None
    if set(map(type, gradients)) == {Tensor}:
        return plain.squared_norms(gradients, precise=precise)
    sharded = [dtensor.is_sharded(gradient) for gradient in gradients]
    device = dtensor.device_of(gradients[0])
    squares = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    for kind, measure in ((True, dtensor.squared_norms), (False, plain.squared_norms)):
        where = [index for index, is_sharded in enumerate(sharded) if is_sharded is kind]
        if where:
            part, _ = measure([gradients[index] for index in where], precise=precise)
            squares[torch.tensor(where, device=device)] = part.to(device)
    return squares, None


@torch.no_grad()
def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of an element of each tensor, float64 `[len(tensors)]`; infinity for a sharded tensor, of which
    only all ranks together could tell."""
    local = [not dtensor.is_sharded(tensor) for tensor in tensors]
    device = dtensor.device_of(tensors[0])
    largest = torch.full((len(tensors),), torch.inf, dtype=torch.float64, device=device)
    if any(local):
        where = torch.tensor(local, device=device)
        largest[where] = plain.largest_magnitudes(list(itertools.compress(tensors, local))).to(device)
    return largest
