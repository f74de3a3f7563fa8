"""Read and write safetensors files by ranges of rows, without mapping them into memory.

The safetensors library maps a file, and mapped pages count as used memory until the system reclaims
them. This module copies SAEs of hundreds of GiB in pieces of a few MiB. Before a header is used,
its size and every shape, dtype and offset are checked against the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from foundation.atomic_files import naming, parse_json
from sae_core.errors import DamagedCheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_ALIGNMENT = 8
BLOCK_BYTES = 16 << 20
"""Size of the pieces in which a tensor is copied."""


@dataclass(frozen=True)
class Entry:
    """Dtype, shape and location of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    """Offset of the first byte from the beginning of the file."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one row (one index of the first dimension) in bytes; a scalar is one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    entries: dict[str, Entry]
    """Tensors by name."""
    metadata: dict[str, str]


def rows_per_block(row_bytes: int) -> int:
    """Return the number of rows in a block of about `BLOCK_BYTES`, at least 1."""
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        DamagedCheckpointError: If the file is unreadable or not a safetensors file, or if its
            header is invalid: tensors that overlap, leave gaps or end outside the file, or a shape
            that does not match its number of bytes.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            n_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            _require(path, size > _LENGTH_BYTES, f"{size} bytes, too short for a safetensors file")
            fits = n_bytes <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES)
            _require(
                path,
                fits,
                f"a header of {n_bytes} bytes in a file of {size} bytes: expected at most "
                f"{_MAX_HEADER_BYTES} bytes, and within the file",
            )
            document = parse_json(file.read(n_bytes))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {error}") from error
    _require(path, isinstance(document, dict), "expected the header to be a JSON object")
    metadata = document.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    _require(path, texts, "expected __metadata__ to be an object of strings")
    begin = _LENGTH_BYTES + n_bytes
    entries = {name: _entry(path, name, raw, begin) for name, raw in document.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset_bytes):
        _require(path, entry.offset_bytes == end, f"{name} overlaps another tensor or leaves a gap")
        end += entry.n_bytes
    _require(path, end == size, f"tensors end at byte {end}, but the file ends at byte {size}")
    return Header(entries, metadata)


def _entry(path: Path, name: str, raw: Any, begin: int) -> Entry:
    known = isinstance(raw, dict) and set(raw) == {"dtype", "shape", "data_offsets"}
    _require(path, known, f"{name}: expected exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    _require(
        path,
        isinstance(dtype, str) and dtype in DTYPES,
        f"{name} has an unknown dtype, {dtype!r:.40}",
    )
    whole = _whole_numbers(shape) and len(shape) <= _MAX_DIMENSIONS
    _require(path, whole, f"{name} has an invalid shape, {shape!r:.80}")
    _require(
        path,
        _whole_numbers(offsets) and len(offsets) == 2,
        f"{name} has invalid data_offsets, {offsets!r:.80}",
    )
    entry = Entry(DTYPES[dtype], tuple(shape), begin + offsets[0])
    spans = offsets[1] - offsets[0] == entry.n_bytes
    _require(path, spans, f"{name}: data_offsets do not fit shape {shape!r:.80} of {dtype}")
    return entry


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _require(path: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise DamagedCheckpointError(f"{path}: {problem}")


def read_rows(path: Path, entry: Entry, first: int, out: torch.Tensor) -> None:
    """Read rows of a tensor into `out`.

    Args:
        path: The file.
        entry: The tensor's entry in its header.
        first: Index of the first row; 0 for a scalar.
        out: Contiguous tensor on the host, with the entry's dtype and trailing shape. Its first
            dimension gives the number of rows.

    Raises:
        DamagedCheckpointError: If the file is unreadable or too short.
    """
    view = memoryview(_bytes_of(out))
    offset = entry.offset_bytes + first * entry.row_bytes
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            while view:  # one call may return fewer bytes than requested
                read = os.preadv(fd, [view], offset)
                _require(path, read > 0, "the file is shorter than its header says")
                view, offset = view[read:], offset + read
        finally:
            os.close(fd)
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    # A single number counts as contiguous whatever its stride is, but is viewed only with stride 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def write_at(fd: int, tensor: torch.Tensor, offset_bytes: int) -> None:
    """Write the bytes of a tensor (on any device) to an open file, at the given offset."""
    view = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
    while view:
        written = os.pwrite(fd, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written


class TensorFileWriter:
    """Context manager that creates a safetensors file of known shapes and fills it in pieces.

    The file is flushed to disk when the block ends without an error.

    Args:
        path: The file to create; it must not exist.
        shapes: `{name: (dtype, shape)}`, in the order of the file.
        metadata: Entries to add to the file's metadata.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        document: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (dtype, shape) in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            document[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)  # pad, so that the data are aligned
        begin = _LENGTH_BYTES + len(text)
        self.entries = {
            name: Entry(dtype, tuple(shape), begin + document[name]["data_offsets"][0])
            for name, (dtype, shape) in shapes.items()
        }
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with naming(path):
                os.pwrite(self._fd, len(text).to_bytes(_LENGTH_BYTES, "little") + text, 0)
                os.ftruncate(self._fd, begin + end)
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with naming(self.path):
                    os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write `rows` [n, ...] to rows [first, first + n) of a tensor."""
        entry = self.entries[name]
        with naming(self.path):
            write_at(self._fd, rows.to(entry.dtype), entry.offset_bytes + first * entry.row_bytes)

    def write_bytes(self, name: str, first_byte: int, data: torch.Tensor) -> None:
        """Write `data` [n] uint8 to bytes [first_byte, first_byte + n) of a tensor."""
        with naming(self.path):
            write_at(self._fd, data, self.entries[name].offset_bytes + first_byte)

    def write_columns(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write `rows` [n, D] transposed, to columns [first, first + n) of a tensor [D, L]."""
        entry = self.entries[name]
        with naming(self.path):
            write_columns_at(self._fd, entry, first, rows.to(entry.dtype))


def write_columns_at(fd: int, entry: Entry, first: int, rows: torch.Tensor) -> None:
    """Write `rows` [n, D] transposed, to columns [first, first + n) of a [D, L] tensor.

    Args:
        fd: File descriptor of the open file.
        entry: The tensor's entry in the file's header.
        first: Index of the first column.
        rows: [n, D] in the entry's dtype, on any device.
    """
    start = entry.offset_bytes + first * entry.dtype.itemsize
    for index, column in enumerate(rows.detach().cpu().T.contiguous()):
        write_at(fd, column, start + index * entry.row_bytes)
