"""Errors of the activation store; each message gives the value, what was expected and the fix."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, FoundryError


class StoreError(FoundryError):
    """Base class of all errors that this package raises."""


class StoreFormatError(StoreError):
    """Not an activation store, a newer schema version, or invalid metadata."""


class UnknownCodecError(StoreFormatError):
    """The store was written with a codec that is neither built in, installed nor registered."""


class CodecError(StoreError):
    """A codec returned other arrays or larger chunks than it declares; the codec must be fixed."""


class StoreMismatchError(StoreError):
    """The existing store was created with other settings than the ones requested."""


class MissingDataError(StoreError):
    """A file that the store needs is missing; the message names it."""

    exit_code = EXIT_FAILED


class DamagedDataError(StoreError):
    """A file or chunk has the wrong size or checksum; the message names the file and the chunk."""

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
    """An object store request failed after all retries; the message contains no secrets."""

    exit_code = EXIT_FAILED


class ItemError(StoreError, ValueError):
    """Rows or sidecars passed to `write_item` have the wrong shape, dtype or range."""


class NonDeterministicItemError(StoreError):
    """A second attempt at a committed item produced different bytes from the first."""


DAMAGE = (MissingDataError, DamagedDataError, StoreFormatError)
"""Errors that prove stored bytes missing or wrong, rather than temporarily unreadable."""
