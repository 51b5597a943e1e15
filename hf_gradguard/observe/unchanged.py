"""Running a model for a look at it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.backends.dtensor import local_part
from hf_gradguard.observe.random_state import RandomState


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Puts buffers, training flags and random state back at the end, whatever happens; gradients and weights are for
    the caller to leave alone.

    Args:
        root: the model, unwrapped.
    """
    with ExitStack() as stack:
        stack.callback(RandomState.capture().restore)
        for module in root.modules():
            stack.callback(setattr, module, "training", module.training)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, buffer in ((name, buffer) for name, buffer in buffers if not buffer.is_meta):
                stack.callback(put_back, module, name, buffer, buffer.detach().clone())
        yield


@torch.no_grad()
def put_back(owner: Any, name: str, tensor: Tensor | None, values: Tensor | None) -> None:
    """Makes an attribute the tensor that it was, which holds these values again."""
    setattr(owner, name, tensor)
    # Only what has changed: some buffers are expanded, and can't be written to.
    if tensor is not None and values is not None and not torch.equal(local_part(tensor), local_part(values)):
        local_part(tensor).copy_(local_part(values))
