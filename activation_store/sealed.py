"""JSON whose every byte is under a checksum, and the bounds within which any JSON is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from activation_store.checksum import crc32c
from activation_store.errors import DamagedDataError, StoreFormatError

if TYPE_CHECKING:
    from activation_store.storage import Storage

_SEAL = b'{"crc32c":"%08x",'
_SEAL_BYTES = len(_SEAL % 0)
_LARGEST = 1 << 62


def parse_json(where: str, data: bytes) -> dict[str, Any]:
    """The object in `data`.

    Raises:
        StoreFormatError: `where` holds no JSON object, or one nested beyond reason.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{where} is damaged or no JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreFormatError(f"{where} holds a {type(document).__name__}: expected an object")
    return document


def seal(document: dict[str, Any]) -> bytes:
    """JSON whose first key is the crc32c (hexadecimal) of all the bytes after it."""
    rest = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()[1:]
    return _SEAL % crc32c(rest) + rest


def unseal(where: str, data: bytes) -> dict[str, Any]:
    """What `seal` made `data` of.

    Raises:
        DamagedDataError: A byte of it is not what was written; names `where`.
        StoreFormatError: It is no JSON object.
    """
    rest = data[_SEAL_BYTES:]
    if data[:_SEAL_BYTES] != _SEAL % crc32c(rest):
        raise DamagedDataError(f"{where} fails its checksum; restore it from a backup")
    return parse_json(where, b"{" + rest)


def read_sealed(storage: Storage, name: str, limit_bytes: int) -> dict[str, Any]:
    """What `seal` wrote under `name`.

    Raises:
        MissingDataError: It is not there.
        DamagedDataError: A byte of it is not what was written.
        StoreFormatError: It is larger than `limit_bytes`, or no JSON object.
    """
    return unseal(storage.where(name), storage.read(name, limit_bytes))


def whole_numbers(where: str, document: dict[str, Any], keys: Sequence[str]) -> list[int]:
    """The values of `keys`, which must be all that `document` has, in their order.

    Raises:
        StoreFormatError: `where` has other keys, or a value that is no whole number from 0 on.
    """
    values = [document.get(key) for key in keys]
    numbers = [value for value in values if type(value) is int and 0 <= value <= _LARGEST]
    if set(document) != set(keys) or len(numbers) < len(keys):
        raise StoreFormatError(
            f"{where} holds {document}: expected whole numbers {list(keys)}; restore it"
        )
    return numbers
