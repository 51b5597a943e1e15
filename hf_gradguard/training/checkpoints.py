"""The output folder of a run: may it be written to, and which of its checkpoints is whole."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_gradguard.integrations.checkpoint import DIRECTORY as GUARD

OWN_FILE = "recipe.json"
"""Marks a folder as that of a recipe, and holds what a run of it can't change when it goes on."""
WEIGHTS = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
}
"""Files of which a checkpoint has one."""
_NAME = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


class Processes(TrainerCallback, ExportableState):
    """Keeps in each checkpoint how many processes have written to it."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def state(self) -> dict[str, Any]:
        """What Trainer keeps in `trainer_state.json`."""
        return {"args": {"count": self.count}, "attributes": {}}


def claim(folder: str, essentials: dict[str, Any], *, is_main: bool) -> None:
    """Takes a folder for this run: a new or empty one, or that of the same run, which then goes on.

    Args:
        folder: the output folder.
        essentials: options by name; a run that goes on must have the same.
        is_main: whether this process writes.

    Raises:
        ValueError: the folder holds something else, or a run with other options.
    """
    path = Path(folder)
    own = path / OWN_FILE
    if own.is_file():
        _compare(json.loads(own.read_text(encoding="utf-8")), essentials, folder)
        return
    incomplete = own.with_suffix(".incomplete")
    held = sorted(item.name for item in path.iterdir() if item != incomplete) if path.is_dir() else []
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {folder!r} is a file: give a folder")
    if held and last_whole(folder) is None:
        few = ", ".join(held[:3]) + (" …" if len(held) > 3 else "")
        raise ValueError(
            f"--output_dir {folder!r} is not empty ({few}) and holds no run to go on with: give another folder, "
            "or empty this one"
        )
    if is_main:
        path.mkdir(parents=True, exist_ok=True)
        incomplete.write_text(json.dumps(essentials, indent=2), encoding="utf-8")
        incomplete.replace(own)


def _compare(before: dict[str, Any], now: dict[str, Any], folder: str) -> None:
    for name in now:
        if name in before and before[name] != now[name]:
            raise ValueError(
                f"--output_dir {folder!r} holds a run with --{name} {before[name]}, and now it is {now[name]}: "
                "give another folder, or the same options to go on with that run"
            )


def last_whole(folder: str) -> Path | None:
    """The newest checkpoint in which nothing is missing or cut off; None where there is none."""
    return next((path for path in reversed(_checkpoints(folder)) if what_is_broken(path) is None), None)


def set_aside(folder: str) -> list[str]:
    """Renames the checkpoints that a kill has left unfinished, so that nothing is taken for one; returns a line about
    each. An earlier one that was set aside in its place is removed."""
    lines = []
    for path in _checkpoints(folder):
        if (reason := what_is_broken(path)) is not None:
            aside = path.with_name(f"incomplete-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            lines.append(f"{path.name} is not whole ({reason}): passed over, and renamed to {aside.name}")
    return lines


def what_is_broken(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be gone on from, or None if it can.

    Trainer writes `trainer_state.json` last, after all else in that process. Files are looked at for being cut off: the
    weights by the sizes that they declare, what torch has saved by the index at its end.
    """
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return "no trainer_state.json, which is written last"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_whole(path):
            return f"{path.relative_to(checkpoint)} is cut off"
    missing = _missing(checkpoint, json.loads(state.read_text(encoding="utf-8")))
    return f"{missing} is missing" if missing else None


def _missing(checkpoint: Path, state: dict[str, Any]) -> str | None:
    """A file that ought to be there and is not. Of what is written by other means (shards of FSDP and DeepSpeed lie in
    folders of their own) nothing is known, and nothing of the optimizer with `save_only_model`."""
    names = {path.name for path in checkpoint.iterdir()}
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if shards - names:
            return str(min(shards - names))
    if any(path.is_dir() and path.name != GUARD for path in checkpoint.iterdir()):
        return None
    if not names & WEIGHTS:
        return "model.safetensors"
    count = (
        state.get("stateful_callbacks", {}).get("Processes", {}).get("args", {}).get("count", 0)
    )  # 0: not a recipe's
    ranks = {"rng_state.pth"} if count == 1 else {f"rng_state_{rank}.pth" for rank in range(count)}
    needed = {"optimizer.pt", "scheduler.pt", *ranks}
    return min(needed - names) if needed & names and needed - names else None


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return True


def _checkpoints(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        return []
    found = [(int(match[1]), path) for path in Path(folder).iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]
