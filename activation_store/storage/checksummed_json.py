"""Checksummed JSON files, and safe parsing of JSON in general."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from activation_store.checksum import crc32c
from activation_store.errors import DamagedDataError, StoreFormatError

if TYPE_CHECKING:
    from activation_store.storage.base import Storage

_CHECKSUM = b'{"crc32c":"%08x",'
_CHECKSUM_BYTES = len(_CHECKSUM % 0)
_LARGEST = 1 << 62


def parse_json(where: str, data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        where: Name of the file, for error messages.
        data: Content of the file.

    Raises:
        StoreFormatError: If `data` is not a JSON object, or is nested too deeply.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreFormatError(f"{where} holds a {type(document).__name__}: expected a JSON object")
    return document


def dump_checksummed(document: dict[str, Any]) -> bytes:
    """Serialise to checksummed JSON, which begins with the crc32c (hex) of all bytes after it."""
    rest = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()[1:]
    return _CHECKSUM % crc32c(rest) + rest


def load_checksummed(where: str, data: bytes) -> dict[str, Any]:
    """Parse checksummed JSON. This is the inverse of `dump_checksummed`.

    Args:
        where: Name of the file, for error messages.
        data: Content of the file.

    Raises:
        DamagedDataError: If the checksum does not match.
        StoreFormatError: If `data` is not a JSON object.
    """
    rest = data[_CHECKSUM_BYTES:]
    if data[:_CHECKSUM_BYTES] != _CHECKSUM % crc32c(rest):
        raise DamagedDataError(f"{where} fails its checksum; restore it from a backup")
    return parse_json(where, b"{" + rest)


def read_checksummed(storage: Storage, name: str, limit_bytes: int) -> dict[str, Any]:
    """Read a checksummed JSON file.

    Raises:
        MissingDataError: If the file is missing.
        DamagedDataError: If the checksum does not match.
        StoreFormatError: If the file is larger than `limit_bytes` or is not a JSON object.
    """
    return load_checksummed(storage.where(name), storage.read(name, limit_bytes))


def whole_numbers(where: str, document: dict[str, Any], keys: Sequence[str]) -> list[int]:
    """Check that `document` is valid, and return its values in the order of `keys`.

    Args:
        where: Name of the file, for error messages.
        document: Content of the file. It must have exactly the keys in `keys`, and integers of at
            least 0 as values.
        keys: Expected keys.

    Raises:
        StoreFormatError: If a key is missing or unknown, or a value is invalid.
    """
    values = [document.get(key) for key in keys]
    numbers = [value for value in values if type(value) is int and 0 <= value <= _LARGEST]
    if set(document) != set(keys) or len(numbers) < len(keys):
        raise StoreFormatError(
            f"{where} contains {document}: expected exactly the keys {list(keys)}, with "
            "non-negative integers as values; restore the file from a backup"
        )
    return numbers
