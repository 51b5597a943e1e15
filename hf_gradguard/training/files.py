"""Text files, looked at before they are read: there, not empty, UTF-8."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How what is compressed is looked into; `.zst` is not before it is read."""
CHUNK = 1 << 22
STREAM_HEAD = 1 << 26
"""Bytes of a file that is streamed which are looked at before training; all of it would take as long as reading it."""


def kind_of(paths: Sequence[str]) -> str:
    """What is in these files, by their endings: one of the values of `KINDS`.

    Raises:
        ValueError: an ending that is unknown, or files of several kinds.
    """
    kinds = {path: KINDS.get(_suffix(path), "") for path in paths}
    for path, kind in kinds.items():
        if not kind:
            raise ValueError(f"{path}: what is in a file is told by its ending, one of {', '.join(KINDS)}")
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{path} ({kind})" for path, kind in kinds.items())
        raise ValueError(f"files of one run must be of one kind: {named}")
    return next(iter(kinds.values()))


def check(paths: Sequence[str], *, streaming: bool = False) -> None:
    """Looks at each file.

    Raises:
        ValueError: one does not exist, is empty, can't be unpacked, or (text, csv, json) holds bytes that are not
            UTF-8; the message names the file and where in it.
    """
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"there is no file {path!r}")
        if file.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        if _suffix(path) == ".parquet" or file.suffix.lower() == ".zst":
            continue
        try:
            _check_encoding(file, STREAM_HEAD if streaming else None)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} can't be read: {error}") from None


def _check_encoding(path: Path, limit: int | None) -> None:
    decoder, position, is_blank = codecs.getincrementaldecoder("utf-8")(), 0, True
    with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
        while limit is None or position < limit:
            chunk = file.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                is_blank &= not decoder.decode(chunk, final=not chunk).strip()
            except UnicodeDecodeError as error:
                at = position - pending + error.start
                raise ValueError(
                    f"{path} is not UTF-8: byte {at:,} is 0x{error.object[error.start]:02x}. Convert it, as with "
                    f"iconv -f {_guess(chunk) if not position else 'LATIN1'} -t UTF-8"
                ) from None
            if not chunk:
                break
            position += len(chunk)
    if is_blank:
        raise ValueError(f"{path} holds nothing but blanks")


def _guess(head: bytes) -> str:
    """The name that iconv has for what a file begins with."""
    return "UTF-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"


def _suffix(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
