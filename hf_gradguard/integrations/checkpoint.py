"""Where a guard is kept in the Trainer's checkpoints: small state in `trainer_state.json`, held gradients beside it.

The Trainer tells a callback neither where a checkpoint is nor that it is being loaded. So both parts carry the run and
the window of which they are, and only parts that match are put together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_gradguard.events import Event

if TYPE_CHECKING:
    from hf_gradguard.guard import GradGuard

DIRECTORY = "gradguard"
_KEY = "gradguard"


def small_state(guard: GradGuard) -> dict[str, Any]:
    """The guard's state as JSON values; of the gradients that it holds, only which they are."""
    state = guard.state_dict()
    has_held = bool(state.pop("held"))
    return {**state, "held_in": _identity(guard) if has_held else None}


def save_held(guard: GradGuard, checkpoint: Path, *, is_main: bool) -> None:
    """Writes the gradients that the guard holds into a checkpoint that the Trainer has written, if it holds any.

    Args:
        guard: whose.
        checkpoint: the directory; nothing is written where there is none, as in a search for hyper-parameters.
        is_main: whether this process writes what all processes have alike; shards are written by each.
    """
    held = guard.state_dict()["held"]
    if not held or not checkpoint.is_dir() or not (is_main or guard.is_sharded):
        return
    path = checkpoint / DIRECTORY / _file_name(guard.is_sharded)
    incomplete = path.with_suffix(".incomplete")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(held, incomplete, metadata={_KEY: json.dumps(_identity(guard))})
        os.replace(incomplete, path)
    except (OSError, SafetensorError) as error:
        message = (
            f"the held gradients can't be written to {path} ({error}): a run resumed from here starts without them"
        )
        guard.say(Event("warning", guard.step_number, message=message))


def restore(guard: GradGuard, state: dict[str, Any], checkpoints: Sequence[Path]) -> None:
    """Restores what `small_state` and `save_held` kept. What is missing or does not fit costs one warning.

    Args:
        guard: a new one.
        state: what `small_state` gave.
        checkpoints: directories in one of which the held gradients may be.
    """
    wanted = state.get("held_in")
    held = None if wanted is None else _find(wanted, checkpoints, sharded=guard.is_sharded)
    message = None
    try:
        guard.load_state_dict({**state, "held": held or {}})
    except (ValueError, KeyError) as error:
        message = f"the guard starts afresh, its state in the checkpoint does not fit ({error})"
    if wanted is not None and held is None:
        places = " or ".join(str(place / DIRECTORY) for place in dict.fromkeys(checkpoints))
        message = f"the gradients that were held back in window {wanted['step']} are not in {places}: they are lost"
    if message is not None:
        guard.say(Event("warning", guard.step_number, message=message))


def _identity(guard: GradGuard) -> dict[str, Any]:
    return {"run": guard.run_id, "step": guard.step_number}


def _find(wanted: dict[str, Any], checkpoints: Sequence[Path], *, sharded: bool) -> dict[str, Tensor] | None:
    for path in (checkpoint / DIRECTORY / _file_name(sharded) for checkpoint in checkpoints):
        try:
            with safe_open(path, framework="pt") as file:
                if json.loads((file.metadata() or {}).get(_KEY, "null")) == wanted:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    return None


def _file_name(sharded: bool) -> str:
    if not sharded:
        return "held.safetensors"
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return f"held-{rank:05d}-of-{ranks:05d}.safetensors"
