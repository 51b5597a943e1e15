"""Tables that are written while they are read: Arrow IPC streams with a checksum on every batch.

Format: Apache Arrow, "Encapsulated message format" and "IPC streaming format" of the Columnar Format specification.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.record.files import RecordError

_CHECKSUM = b"crc32"
_CONTINUATION = b"\xff\xff\xff\xff"
_LONGEST_HEADER = 1 << 20
_LONGEST_BODY = 1 << 31
"""Longer than anything that is ever written: a length above it is garbage, not a message whose end is missing."""

Ragged = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""A list column: the rows that are there, `[k, width]`, and which rows of the table these are, `[n]` with k True."""


def windows_schema() -> Any:
    """Columns of `windows.arrow`."""
    import pyarrow as pa

    numbers = ("loss", "learning_rate", "total_norm", "clip_coefficient", "seconds")
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            *(pa.field(name, pa.float64(), nullable=False) for name in numbers),
            pa.field("updated", pa.bool_(), nullable=False),
            _list_field("norms"),
            _list_field("group_norms"),
        ]
    )


def weights_schema() -> Any:
    """Columns of `weights.arrow`."""
    import pyarrow as pa

    return pa.schema(
        [pa.field("step", pa.int64(), nullable=False), _list_field("weight_norms"), _list_field("update_ratios")]
    )


def accumulation_schema() -> Any:
    """Columns of `accumulation.arrow`."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("windows", pa.int32(), nullable=False),
            *(pa.field(name, pa.float64(), nullable=False) for name in ("weight", "accumulated_norm", "noise_scale")),
            pa.field("updated", pa.bool_(), nullable=False),
        ]
    )


def time_profiles_schema() -> Any:
    """Columns of `time_profiles.arrow`: one row a lag, all lags of one profile in one batch."""
    import pyarrow as pa

    numbers = ("mean", "low", "middle", "high", "zero_share")
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("lag", pa.int32(), nullable=False),
            *(pa.field(name, pa.float64(), nullable=False) for name in numbers),
            pa.field("samples", pa.int32(), nullable=False),
        ]
    )


def _list_field(name: str) -> Any:
    import pyarrow as pa

    return pa.field(name, pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False)


class StreamWriter:
    """Appends batches to a new stream file, each in one write, so that a reader meets at most one incomplete.

    Args:
        path: of the file, which must not exist.
        schema: of every batch; float lists are given as `Ragged`, all else as arrays `[n]`.

    Raises:
        OSError: by any method, when the file can't be written.
    """

    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow as pa

        self._schema = schema
        self._file = path.open("xb", buffering=0)
        self._pending = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._pending, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))

    def append(self, columns: Mapping[str, NDArray[Any] | Ragged]) -> int:
        """Writes one batch and returns the bytes that the file grew by."""
        import pyarrow as pa

        arrays = [_to_arrow(columns[field.name], field) for field in self._schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._stream.write_batch(batch, custom_metadata={_CHECKSUM: f"{_checksum(batch):08x}"})
        return self._write_pending()

    def close(self) -> None:
        """Marks the end of the stream and closes the file. After a failed write there is nothing left to do."""
        if not self._file.closed:
            self._stream.close()
            self._write_pending()
            self._file.close()

    def _write_pending(self) -> int:
        data = self._pending.getvalue()
        self._pending.seek(0)
        self._pending.truncate()
        try:
            write_all(self._file, data)
        except OSError:
            # What came after an incomplete batch would make it look complete.
            self._file.close()
            raise
        return len(data)


def write_all(file: FileIO, data: bytes) -> None:
    """Writes all of it to an unbuffered file, whose own `write` may stop early."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def read_stream(path: Path, schema: Any) -> Iterator[Any]:
    """The complete batches of a stream file, one after the other; none if there is no such file yet.

    A last batch that is incomplete, because it is being written or its writer was killed, is passed over.

    Raises:
        RecordError: the file is not such a stream, or anything in it but its end is not what was written.
    """
    import pyarrow as pa

    try:
        data = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecordError.damaged(path, error) from error
    end = _end_of_complete_messages(path, memoryview(data).cast("B"))
    if not end:
        return
    try:
        reader = pa.ipc.open_stream(data.slice(0, end))
        if not reader.schema.equals(schema):
            raise RecordError.damaged(path, f"its columns are {reader.schema.names}, not {schema.names}")
        for batch, metadata in reader.iter_batches_with_custom_metadata():
            batch.validate(full=True)
            if metadata is None or metadata[_CHECKSUM] != f"{_checksum(batch):08x}".encode():
                raise RecordError.damaged(path, "a checksum does not match")
            yield batch
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise RecordError.damaged(path, error) from error


def _to_arrow(column: NDArray[Any] | Ragged, field: Any) -> Any:
    import pyarrow as pa

    if not isinstance(column, tuple):
        return pa.array(column, field.type)
    rows, present = column
    offsets = np.concatenate([[0], np.cumsum(present * rows.shape[1])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)), type=field.type)


def _checksum(batch: Any) -> int:
    crc = 0
    for column in batch.columns:
        for part in (column.offsets, column.values) if hasattr(column, "offsets") else (column,):
            values: Any = part.to_numpy(zero_copy_only=False)
            crc = zlib.crc32(values, crc)
    return crc


def _end_of_complete_messages(path: Path, data: memoryview) -> int:
    """Where the last message ends whose every byte is there. Arrow itself does not tell a cut end from garbage."""
    position = 0
    try:
        while position + 8 <= len(data):
            if data[position : position + 4] != _CONTINUATION:
                raise RecordError.damaged(path, f"no Arrow message begins at byte {position}")
            (header,) = struct.unpack_from("<i", data, position + 4)
            if header == 0:
                return position + 8
            if not 0 < header <= _LONGEST_HEADER:
                raise RecordError.damaged(path, f"the message at byte {position} has an impossible length")
            if position + 8 + header > len(data):
                return position
            body = _body_length(data[position + 8 : position + 8 + header])
            if not 0 <= body <= _LONGEST_BODY:
                raise RecordError.damaged(path, f"the message at byte {position} has an impossible length")
            if position + 8 + header + body > len(data):
                return position
            position += 8 + header + body
    except struct.error as error:
        raise RecordError.damaged(path, f"the message at byte {position} is garbage: {error}") from error
    if not _CONTINUATION.startswith(bytes(data[position : position + 4])):
        raise RecordError.damaged(path, f"no Arrow message begins at byte {position}")
    return position


def _body_length(header: memoryview) -> int:
    """`bodyLength`, fourth field of the flatbuffer table `Message` (Arrow's `format/Message.fbs`); 0 if left out."""
    (table,) = struct.unpack_from("<I", header, 0)
    (to_vtable,) = struct.unpack_from("<i", header, table)
    vtable = table - to_vtable
    if vtable < 0:
        raise struct.error("a table before the start of the message")
    (size,) = struct.unpack_from("<H", header, vtable)
    slot = 4 + 2 * 3
    (offset,) = struct.unpack_from("<H", header, vtable + slot) if size > slot else (0,)
    return int(struct.unpack_from("<q", header, table + offset)[0]) if offset else 0
