"""The deletion mark, which records the item up to which shards are deleted; see `retention.py`.

_deleted.json   {"announced": a, "below": b, "swept": s, "consumers": {name: first item kept}}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from activation_store.errors import DeletedDataError, MissingDataError, StoreFormatError
from activation_store.storage.base import Storage
from activation_store.storage.checksummed_json import (
    dump_checksummed,
    read_checksummed,
    whole_numbers,
)

DELETION_MARK = "_deleted.json"
_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class DeletionMark:
    """The deletion mark of a store. `below` and `swept` never decrease."""

    announced: int = 0
    """Item number, at least `below`. No new consumer may need an item below this number."""
    below: int = 0
    """Item number. The shards of items below this number must not be read any more."""
    swept: int = 0
    """Item number, at most `below`. The shards of items below this number have been deleted."""
    consumers: dict[str, int] = field(default_factory=dict)
    """First item that each consumer still needed at the time of the deletion, by consumer name."""

    def describe(self) -> str:
        """Return a description for error messages."""
        if self.announced > self.below:
            return f"items below {self.announced} are being deleted"
        slowest = min(self.consumers, key=lambda name: self.consumers[name], default="?")
        return (
            f"items below {self.below} were deleted after all consumers had passed them, "
            f"{slowest!r} last"
        )


def read_deletion_mark(storage: Storage) -> DeletionMark:
    """Read the deletion mark; a store without this file has no deleted shards.

    Raises:
        DamagedDataError: If the file fails its checksum.
        StoreFormatError: If the file is invalid.
    """
    try:
        document = read_checksummed(storage, DELETION_MARK, _FILE_BYTES)
    except MissingDataError:
        return DeletionMark()
    where = storage.where(DELETION_MARK)
    names = document.pop("consumers", None)
    numbers = whole_numbers(where, document, ("announced", "below", "swept"))
    if not isinstance(names, dict) or numbers != sorted(numbers, reverse=True):
        raise StoreFormatError(f"{where} is not a valid deletion mark; restore it from a backup")
    announced, below, swept = numbers
    return DeletionMark(announced, below, swept, names)


def write_deletion_mark(storage: Storage, mark: DeletionMark) -> None:
    """Write the deletion mark. The mark is durable when this returns."""
    storage.put(DELETION_MARK, [dump_checksummed(asdict(mark))])


def deleted_error(storage: Storage, what: str, mark: DeletionMark) -> DeletedDataError:
    """Return the error for an operation `what` that needs deleted rows."""
    return DeletedDataError(
        f"{storage.path}: {what} needs deleted rows: {mark.describe()}; harvest the store again "
        "with cluster.retention=keep"
    )
