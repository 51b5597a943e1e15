"""Where a NaN or an infinity was born: one micro-batch is run again, with every module and every gradient watched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_gradguard.backends.dtensor import local_part
from hf_gradguard.observe.eager import uncompiled
from hf_gradguard.observe.random_state import RandomState
from hf_gradguard.observe.ranges import leaves
from hf_gradguard.observe.structure import unwrapped_root
from hf_gradguard.observe.tracer import Origin, Tracer
from hf_gradguard.observe.unchanged import put_back, unchanged

__all__ = ["MicroBatch", "Origin", "save", "trace"]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, kept by reference, so that it can be run again."""

    run: Callable[[], object]
    """Its forward and backward pass, exactly as training ran it; returns the loss, or anything."""
    inputs: Mapping[str, Any]
    """What the model was given."""
    random_state: RandomState
    """As it was before the forward pass."""


def trace(model: nn.Module, micro_batch: MicroBatch) -> Origin:
    """Runs a micro-batch once more and finds which module first made something non-finite.

    Gradients, buffers, random state and training flags are afterwards as they were, and no hook is left, also where
    the replay fails. Compiled code runs uncompiled. In a distributed run the replay communicates like the backward
    pass that it repeats, so every process has to call it. An engine that steps the optimizer within the backward pass
    (DeepSpeed, LOMO) would make an update: don't replay there.

    Args:
        model: wrapped or not.
        micro_batch: what to run. A `run` without a backward pass is traced as far as it goes.

    Returns:
        The origin, or one without a direction, whose message says that nothing bad was found or why the replay failed.
        No exception of it gets out.
    """
    try:
        root = unwrapped_root(model)
        with _unchanged(root, micro_batch), uncompiled(), torch.enable_grad(), Tracer(root) as tracer:
            micro_batch.random_state.restore()
            result = micro_batch.run()
            return tracer.origin(result)
    except Exception as error:  # it is a diagnosis: whatever it meets, the training goes on
        return Origin(None, None, f"the replay of the micro-batch failed with {type(error).__name__}: {error}")


def save(micro_batch: MicroBatch, path: str | Path) -> None:
    """Writes the inputs of a micro-batch as a safetensors file.

    Tensors have dotted names where the inputs are nested (`past.0.key`). What is no tensor is a JSON object, by the
    same names, under `inputs` in the file's metadata.

    Args:
        micro_batch: its inputs only are written.
        path: of the file; its directory is made.

    Raises:
        OSError: it can't be written. That is for the caller to handle.
    """
    from safetensors.torch import save as serialized

    parts = list(leaves(micro_batch.inputs))
    # Copies, as labels are often the very tensor of the inputs, and the format knows no tensors that share memory.
    tensors = {
        name: local_part(leaf.detach()).to("cpu", copy=True).contiguous()
        for name, leaf in parts
        if isinstance(leaf, Tensor)
    }
    rest = {name: leaf for name, leaf in parts if not isinstance(leaf, Tensor)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized(tensors, {"inputs": json.dumps(rest, default=_as_json)}))


def _as_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


@contextmanager
def _unchanged(root: nn.Module, micro_batch: MicroBatch) -> Iterator[None]:
    """Puts gradients, buffers, training flags and random state back at the end, whatever happens."""
    inputs = [leaf for _, leaf in leaves(micro_batch.inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(unchanged(root))
        for leaf in (*root.parameters(), *(tensor for tensor in inputs if tensor.is_leaf)):
            # DDP may keep its gradients in buffers of its own, which the replay writes to as well.
            copy = leaf.grad.detach().clone() if leaf.grad is not None and _is_distributed() else None
            stack.callback(put_back, leaf, "grad", leaf.grad, copy)
            leaf.grad = None
        yield


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
