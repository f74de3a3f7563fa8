"""What can go wrong in the store, each with the value, what was expected and what mends it."""

from __future__ import annotations


class StoreError(Exception):
    """Base of every error this package raises on purpose."""


class StoreConfigError(StoreError, ValueError):
    """A setting that cannot be: names the key, its value, what was expected and the remedy."""

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{key}={value!r}: expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self._arguments = (key, value, expected, remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Errors travel between processes, and the default would call this class with the message.
        return type(self), self._arguments


class StoreFormatError(StoreError):
    """The folder is not a store of ours, is of a newer schema, or its metadata is absurd."""


class StoreMismatchError(StoreError):
    """A store exists that holds something else than what is about to be written to it."""


class MissingDataError(StoreError):
    """A committed shard or chunk is gone: names the file."""


class DamagedDataError(StoreError):
    """A committed shard or chunk fails its checksum or size: names the file and the chunk."""


class IncompleteStoreError(StoreError):
    """Rows were asked for that nobody has committed yet."""


class DeletedDataError(StoreError):
    """Rows were asked for that were deleted because every registered consumer had passed them."""


class StoreBusyError(StoreError):
    """Somebody else is at work on the store who must not be disturbed."""


class StorageError(StoreError):
    """An object store does not do what it is asked, after every retry; names no secret."""


class ItemError(StoreError, ValueError):
    """Rows or sidecars handed to `write_item` that the store cannot hold."""


class NonDeterministicItemError(StoreError):
    """A second attempt at a committed item gave other bytes than the first one."""


DAMAGE = (MissingDataError, DamagedDataError, StoreFormatError)
"""What says that bytes are not as they were written; not that they cannot be read just now."""
