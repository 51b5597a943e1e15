"""Norms of sharded tensors (FSDP2, HSDP, tensor parallel): each rank measures its shard, one sum makes them global.

`vector_norm(p.grad).item()` of a DTensor silently gives the norm of the local shard. Here the squares of the shards
are added over the mesh dimensions along which the tensor is split, with one all-reduce of P float64 for each kind of
placement (one for FSDP2, whatever P is).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradguard.backends import plain


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor. Does not import torch's DTensor: where none was made, none can come."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard, or all of it."""
    if is_sharded(tensor):
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return local
    return tensor


def device_of(tensor: Tensor) -> torch.device:
    """The device that holds this process's part."""
    return local_part(tensor).device


def squared_norms(gradients: Sequence[Any], *, precise: bool = False) -> tuple[Tensor, None]:
    """See `hf_gradguard.backends.squared_norms`, of which this is the part for DTensors. A collective: call it on
    every rank, with the same gradients in the same order."""
    placed: dict[Any, list[int]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        placed[gradient.device_mesh, gradient.placements].append(index)
    device = device_of(gradients[0])
    squares = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    for (mesh, placements), where in placed.items():
        if any(placement.is_partial() for placement in placements):
            parts = [gradients[index].full_tensor() for index in where]
        else:
            parts = [gradients[index].to_local() for index in where]
        local, _ = plain.squared_norms(parts, precise=precise)
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(local, group=mesh.get_group(dimension))
        squares[torch.tensor(where, device=device)] = local.to(device)
    return squares, None
