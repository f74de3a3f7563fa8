"""Up to which item a store's shards are deleted: written by `retention.py`, read by everybody.

_deleted.json   {"announced": a, "below": b, "swept": s, "consumers": {name: first item kept}}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from activation_store.errors import DeletedDataError, MissingDataError, StoreFormatError
from activation_store.sealed import read_sealed, seal, whole_numbers
from activation_store.storage import Storage

WATERMARK = "_deleted.json"
_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Watermark:
    """How far a store's shards are deleted; the numbers never go down, but for `announced`."""

    announced: int = 0
    """Nobody new may need items below it; at least `below`."""
    below: int = 0
    """Shards of items below it are not to be read any more."""
    swept: int = 0
    """Shards of items below it are gone."""
    consumers: dict[str, int] = field(default_factory=dict)
    """Who had let go of them: consumer to the first item that it kept."""

    def describe(self) -> str:
        """For messages."""
        if self.announced > self.below:
            return f"items below {self.announced} are being deleted"
        slowest = min(self.consumers, key=lambda name: self.consumers[name], default="?")
        return (
            f"items below {self.below} were deleted once all consumers had passed them, the last "
            f"of them {slowest!r}"
        )


def read_watermark(storage: Storage) -> Watermark:
    """How far a store's shards are deleted.

    Raises:
        DamagedDataError, StoreFormatError: The file is not what was written.
    """
    try:
        document = read_sealed(storage, WATERMARK, _FILE_BYTES)
    except MissingDataError:
        return Watermark()
    where = storage.where(WATERMARK)
    names = document.pop("consumers", None)
    numbers = whole_numbers(where, document, ("announced", "below", "swept"))
    if not isinstance(names, dict) or numbers != sorted(numbers, reverse=True):
        raise StoreFormatError(f"{where} cannot be a watermark; restore it from a backup")
    announced, below, swept = numbers
    return Watermark(announced, below, swept, names)


def write_watermark(storage: Storage, mark: Watermark) -> None:
    """Durable when it returns."""
    storage.put(WATERMARK, [seal(asdict(mark))])


def deleted(storage: Storage, what: str, mark: Watermark) -> DeletedDataError:
    """The error of somebody who needs `what`, which is gone."""
    return DeletedDataError(
        f"{storage.path}: {what} needs rows that are gone: {mark.describe()}; harvest the store "
        "again, and keep its rows for whoever reads them again or later"
    )
