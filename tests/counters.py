"""Counts what a guard could cost: waits for the device, collectives, and bytes of gradients read or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# The operators through which a host learns a value, and so waits for a device to have it.
_WAITS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.unique_dim",
    "aten._unique2",
}


class Counters(TorchDispatchMode):
    """Sees every operator that runs inside it, those of the backward pass included.

    `counts` holds `waits` (reads of a tensor's value by the host, and copies from a device), `collectives`,
    `gradient_reads` and `gradient_writes` (bytes of the parameters' gradients that operators outside the backward pass
    took in, or changed).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function).rsplit(".", 1)[0]
        if name in _WAITS or (name == "aten._to_copy" and _leaves_device(args[0], kwargs)):
            self.counts["waits"] += 1
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait_tensor" not in name:
            self.counts["collectives"] += 1
        self._count_gradients(name, args)
        return function(*args, **kwargs)

    def _count_gradients(self, name: str, args: Any) -> None:
        # Views, detaches and the accumulation of the backward pass move no bytes of a finished gradient.
        if not name.startswith(("aten._foreach", "aten.linalg", "aten.norm", "aten.mul", "aten.dot", "aten.any")) and (
            name not in ("aten.cat", "aten.clone", "aten.sum", "aten.square", "aten.isfinite", "aten.abs")
        ):
            return
        storages = {
            parameter.grad.untyped_storage().data_ptr() for parameter in self._parameters if parameter.grad is not None
        }
        tensors = [tensor for tensor in _tensors(args) if tensor.untyped_storage().data_ptr() in storages]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.counts["gradient_reads"] += size
        if name.endswith("_"):
            self.counts["gradient_writes"] += size


def _tensors(args: Any) -> list[torch.Tensor]:
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(_tensors(arg))
    return found


def _leaves_device(tensor: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    target = kwargs.get("device")
    return tensor.device.type != "cpu" and target is not None and torch.device(target).type == "cpu"
