"""Assemble the tensors of a checkpoint from row ranges in several files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foundation.atomic_files import parse_json
from sae_core.checkpoint.safetensors_file import Entry, Header, read_header, read_rows
from sae_core.errors import DamagedCheckpointError

SHARDING = "DCP_SHARDING_INFO"
"""Metadata key of torch's distributed checkpoint. Its JSON value gives the position at which each
tensor of a file begins in the whole tensor: `{tensor: {"saved_offsets": [first row, 0, ...]}}`."""
SAVED_OFFSETS = "saved_offsets"


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor, in one file."""

    path: Path
    entry: Entry
    """Location in the file."""
    first_row: int
    """Index of the first row in the whole tensor."""

    @property
    def stop_row(self) -> int:
        """Index one past the last row; a scalar counts as one row."""
        return self.first_row + (self.entry.shape[0] if self.entry.shape else 1)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk that is read on demand."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    pieces: tuple[Piece, ...]
    """Sorted by row, without gaps or overlaps."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop); returns [stop - start, ...].

        Raises:
            DamagedCheckpointError: If a file is unreadable or too short.
        """
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for piece in self.pieces:
            first, last = max(start, piece.first_row), min(stop, piece.stop_row)
            if first < last:
                part = out[first - start : last - start]
                read_rows(piece.path, piece.entry, first - piece.first_row, part)
        return out

    def whole(self) -> torch.Tensor:
        """Read the whole tensor."""
        return self.rows(0, self.pieces[-1].stop_row).view(self.shape)


def read_layout(folder: Path) -> dict[str, StoredTensor]:
    """Find every tensor of a `weights/` or `optimizer/` folder, reading only headers.

    Raises:
        DamagedCheckpointError: If a header is invalid, or the row ranges of a tensor overlap or
            leave a gap. The message names the file or the tensor.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        first_rows = _first_rows(path, header)
        for name, entry in header.entries.items():
            pieces[name].append(Piece(path, entry, first_rows[name]))
    return {name: _joined(folder, name, parts) for name, parts in pieces.items()}


def _first_rows(path: Path, header: Header) -> dict[str, int]:
    """Return the first row of each entry of a file; 0 if its metadata has no sharding table."""
    text = header.metadata.get(SHARDING)
    if text is None:
        return dict.fromkeys(header.entries, 0)
    try:
        table = parse_json(text)
        return {
            name: _first_row(table[name][SAVED_OFFSETS], e) for name, e in header.entries.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: invalid {SHARDING}: {error!r}") from error


def _first_row(offsets: Any, entry: Entry) -> int:
    whole = isinstance(offsets, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in offsets)
    if not whole or len(offsets) != len(entry.shape) or any(offsets[1:]):
        raise ValueError(f"offsets {offsets!r:.80} do not fit shape {list(entry.shape)}")
    return offsets[0] if offsets else 0


def _joined(folder: Path, name: str, pieces: list[Piece]) -> StoredTensor:
    pieces.sort(key=lambda piece: piece.first_row)
    first, row = pieces[0].entry, 0
    for piece in pieces:
        entry = piece.entry
        if (entry.dtype, entry.shape[1:]) != (first.dtype, first.shape[1:]):
            raise DamagedCheckpointError(
                f"{piece.path}: {name} has a dtype or width that differs from other files"
            )
        if piece.first_row != row:
            raise DamagedCheckpointError(
                f"{folder}: {name}: rows from {row} on are missing or duplicated: {piece.path} "
                f"begins at row {piece.first_row}"
            )
        row = piece.stop_row
    shape = (row, *first.shape[1:]) if first.shape else ()
    return StoredTensor(first.dtype, shape, tuple(pieces))


def sharding_metadata(starts: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Return the metadata of a file with row ranges, as torch's distributed checkpoint reads it.

    Args:
        starts: For each tensor of the file, the index of its first row in the whole tensor and its
            number of dimensions.
    """
    offsets = {
        name: {SAVED_OFFSETS: [first_row, *[0] * (n_dims - 1)] if n_dims else []}
        for name, (first_row, n_dims) in starts.items()
    }
    return {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0"}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a `weights/` or `optimizer/` folder into memory.

    Raises:
        DamagedCheckpointError: If a file is unreadable, or for the same reasons as `read_layout`.
    """
    return {name: tensor.whole() for name, tensor in read_layout(folder).items()}
