"""The files of a segment that are not Arrow streams, and the one error for those that can't be read."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_gradguard.observe.layout import Layout

FORMAT = 2
"""Of what is written; what an earlier version wrote, from format 1 on, is read as well."""
RUN = "run.json"
LAYOUT = "layout.json.gz"
WINDOWS = "windows.arrow"
WEIGHTS = "weights.arrow"
ACCUMULATION = "accumulation.arrow"
TIME_PROFILES = "time_profiles.arrow"
EVENTS = "events.jsonl"
END = "end.json"


class RecordError(ValueError):
    """A path that holds no record, or a record that is damaged. The message names the file and the remedy."""

    @classmethod
    def damaged(cls, path: Path, reason: object) -> RecordError:
        """The error for a file of a segment that is not what the writer wrote."""
        return cls(
            f"{path} is damaged ({reason}); restore it, or move the directory {path.parent} away to read the other "
            "attempts of this run"
        )


def segment_paths(directory: Path) -> list[Path]:
    """Directories of all attempts, in the order in which they were made, complete or not."""
    if not directory.is_dir():
        return []
    numbered = {path: re.fullmatch(r"segment-(\d+)", path.name) for path in directory.iterdir()}
    found = {path: int(match[1]) for path, match in numbered.items() if match}
    return sorted(found, key=found.__getitem__)


def segment_path(directory: Path, number: int) -> Path:
    """Directory of one attempt."""
    return directory / f"segment-{number:04d}"


def write_whole(path: Path, data: bytes) -> int:
    """Writes a file that is never seen in part; returns its size in bytes."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return len(data)


def write_json(path: Path, values: dict[str, Any]) -> int:
    """Writes a JSON object whole, what JSON has no form for as text; returns its size in bytes."""
    return write_whole(path, json.dumps(values, default=str).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        RecordError: it is missing or not one.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError.damaged(path, error) from error
    if not isinstance(values, dict):
        raise RecordError.damaged(path, "not a JSON object")
    return values


def write_layout(path: Path, layout: Layout) -> int:
    """Writes a layout whole; returns its size in bytes (about 1 byte a parameter in a model of equal layers)."""
    values = layout.to_dict()
    parameters: dict[str, Any] = _columns(values["parameters"])
    packed: dict[str, Any] = {
        "groups": _columns(values["groups"]),
        "parameters": parameters | {"name": _split_numbers(parameters.get("name", []))},
    }
    text = json.dumps(packed, separators=(",", ":"))
    return write_whole(path, gzip.compress(text.encode(), mtime=0))


def read_layout(path: Path) -> Layout:
    """Reads a layout.

    Raises:
        RecordError: it is missing or damaged.
    """
    from hf_gradguard.observe.layout import Layout

    try:
        packed = json.loads(gzip.decompress(path.read_bytes()))
        parameters = packed["parameters"] | {"name": _join_numbers(packed["parameters"]["name"])}
        return Layout.from_dict({"groups": _rows(packed["groups"]), "parameters": _rows(parameters)})
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise RecordError.damaged(path, error) from error


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _split_numbers(names: list[str]) -> dict[str, list[Any]]:
    """Names that differ only in their numbers share what stands between them: a quarter of the size when compressed."""
    patterns: dict[tuple[str, ...], int] = {}
    indices = [patterns.setdefault(tuple(re.split(r"\d+", name)), len(patterns)) for name in names]
    return {"patterns": list(patterns), "indices": indices, "numbers": [re.findall(r"\d+", name) for name in names]}


def _join_numbers(packed: dict[str, list[Any]]) -> list[str]:
    names = []
    for index, numbers in zip(packed["indices"], packed["numbers"], strict=True):
        pieces = packed["patterns"][index]
        names.append("".join(a + b for a, b in zip(pieces, [*numbers, ""], strict=True)))
    return names
