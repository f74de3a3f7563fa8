"""Errors of the activation store. Each message states the value, what was expected, and the fix."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, FoundryError


class StoreError(FoundryError):
    """Base class of all errors that this package raises."""


class StoreFormatError(StoreError):
    """The path holds no activation store, another schema version, or invalid metadata."""


class UnknownCodecError(StoreFormatError):
    """The store was written with a codec that is neither built in, installed nor registered."""


class CodecError(StoreError):
    """A codec returned different arrays or larger chunks than it declares, and must be fixed."""


class StoreMismatchError(StoreError):
    """The existing store was created with settings that differ from the requested ones."""


class MissingDataError(StoreError):
    """A file that the store needs is missing. The message names the file."""

    exit_code = EXIT_FAILED


class DamagedDataError(StoreError):
    """A file or chunk has the wrong size or checksum. The message names the file and the chunk."""

    exit_code = EXIT_FAILED


class IncompleteStoreError(StoreError):
    """The requested rows have not been committed yet."""

    exit_code = EXIT_FAILED


class DeletedDataError(StoreError):
    """The requested rows were deleted after every registered consumer had passed them."""

    exit_code = EXIT_FAILED


class StoreBusyError(StoreError):
    """Another process holds a lock on the store."""

    exit_code = EXIT_FAILED


class StorageError(StoreError):
    """A request to an object store failed after all retries. The message contains no secrets."""

    exit_code = EXIT_FAILED


class ItemError(StoreError, ValueError):
    """Rows or sidecars passed to `write_item` have the wrong shape, dtype or range."""


class NonDeterministicItemError(StoreError):
    """A second attempt at a committed item produced different bytes from the first."""


DAMAGE = (MissingDataError, DamagedDataError, StoreFormatError)
"""Errors that prove that stored bytes are missing or wrong, not just temporarily unreadable."""
