"""How far each reader of a growing store has come: what producers wait for and deletion heeds.

    _consumers/<name>.json   one small sealed file per consumer, replaced as a whole

A consumer is let in only if it
needs nothing that is deleted or about to be. Nobody holds a lock: a consumer first writes its file
and then reads the watermark (`watermark.py`), the deleter first announces and then reads the
consumers' files, so that at least one of them sees the other.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from activation_store import log
from activation_store.errors import MissingDataError, StoreConfigError, StoreFormatError
from activation_store.sealed import read_sealed, seal, whole_numbers
from activation_store.storage import Storage, open_storage
from activation_store.watermark import deleted, read_watermark

CONSUMERS = "_consumers"
_FILE_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}")


@dataclass(frozen=True)
class ConsumerState:
    """How far a consumer has come."""

    epoch: int = 0
    next_item: int = 0
    """First item of epoch 0 that it has not passed: the beginning of a window. Later epochs have
    passed them all."""
    keep_from_item: int = 0
    """First item that it, or its oldest kept checkpoint on resume, may still need."""
    position: int = 0
    """Its stream's."""
    updated: float = 0.0
    """Seconds since 1970 (UTC)."""


class Consumer:
    """One reader's cursor, held by the process that decides on its checkpoints.

    A consumer of that name that is known already goes on from its state. One that died holds the
    others back until it comes back or `remove_consumer` takes it away.

    Args:
        path: Of the store.
        name: Unique among the store's consumers: letters, digits, '_', '-', '.'.
        keep_from_item: First item that it may need, if it is new.

    Raises:
        StoreConfigError: A name that cannot be.
        DeletedDataError: It would need what is deleted.
    """

    def __init__(self, path: str | Path, name: str, keep_from_item: int = 0) -> None:
        self._storage = open_storage(path)
        self.name = name
        self._file = _file(name)
        self._storage.make_folder(CONSUMERS)
        try:
            self.state = read_state(self._storage, name)
        except MissingDataError:
            self._put(ConsumerState(next_item=keep_from_item, keep_from_item=keep_from_item))

    def publish(
        self, *, epoch: int = 0, next_item: int, keep_from_item: int, position: int
    ) -> None:
        """Says how far this consumer has come; cheap enough for every window, not every batch.

        All its ranks must have passed what it says: give the position of the slowest, or the one
        before the last. A run of more than one epoch keeps everything: `keep_from_item=0`.

        Args:
            epoch: That it reads.
            next_item: `stream.first_item_needed(position)`; in later epochs the number of items.
            keep_from_item: `stream.first_item_needed` of the oldest checkpoint that is kept.
            position: Of its stream.

        Raises:
            StoreConfigError: A number that cannot be.
            DeletedDataError: It goes back to what is deleted; its state stays as it was.
        """
        self._put(ConsumerState(epoch, next_item, keep_from_item, position))

    def close(self) -> None:
        """It is done and holds nobody back any more. May be repeated."""
        self._storage.delete(self._file)

    def _put(self, state: ConsumerState) -> None:
        for key, value in asdict(state).items():
            if value < 0:
                raise StoreConfigError(key, value, "not negative")
        before: ConsumerState | None = getattr(self, "state", None)
        state = replace(state, updated=time.time())
        self._write(state)
        mark = read_watermark(self._storage)
        if state.keep_from_item < mark.announced:
            if before and before.keep_from_item >= mark.announced:
                self._write(before)
            else:
                self.close()
            needs = f"consumer {self.name!r} from item {state.keep_from_item} on"
            raise deleted(self._storage, needs, mark)
        self.state = state

    def _write(self, state: ConsumerState) -> None:
        self._storage.put(self._file, [seal(asdict(state))])


def consumers(path: str | Path | Storage) -> dict[str, ConsumerState]:
    """All registered consumers of a store, by name.

    Raises:
        DamagedDataError, StoreFormatError: A cursor file cannot be read; names it.
    """
    storage = open_storage(path)
    found = {}
    for name in consumer_names(storage):
        try:
            found[name] = read_state(storage, name)
        except MissingDataError:
            continue  # it was closed since it was listed
    return found


def consumer_names(storage: Storage) -> list[str]:
    """Consumers that have a cursor file, in order; other files are none of ours."""
    files = [file for file in storage.names(CONSUMERS) if file.endswith(".json")]
    names = [file.removesuffix(".json") for file in files]
    return sorted(name for name in names if _NAME.fullmatch(name))


def remove_consumer(path: str | Path, name: str) -> None:
    """Takes away a consumer that died for good, so that it holds nobody back any more.

    Raises:
        StoreConfigError: There is no such consumer.
    """
    storage = open_storage(path)
    if not storage.exists(_file(name)):
        raise StoreConfigError("consumer", name, f"one of {sorted(consumers(path))}")
    storage.delete(_file(name))


def lead_items(path: str | Path) -> int | None:
    """How many items the producers are ahead of the slowest consumer; None without consumers.

    Counts committed items, with or without gaps. A window opens only when it is whole: a bound on
    the lead must leave room for at least a window and the items under way.
    """
    states = consumers(path)
    if not states:
        return None
    return log.count(open_storage(path)) - min(state.next_item for state in states.values())


def _file(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        expected = "letters, digits, '_', '-', '.', at most 200, without '..'"
        raise StoreConfigError("consumer", name, expected)
    return f"{CONSUMERS}/{name}.json"


def read_state(storage: Storage, name: str) -> ConsumerState:
    """One consumer's.

    Raises:
        MissingDataError: There is none of that name.
        DamagedDataError, StoreFormatError: Its file is not what was written.
    """
    file = _file(name)
    document = read_sealed(storage, file, _FILE_BYTES)
    updated = document.pop("updated", None)
    if not isinstance(updated, float):
        raise StoreFormatError(f"{storage.where(file)} cannot be a cursor; remove the consumer")
    keys = ("epoch", "next_item", "keep_from_item", "position")
    epoch, next_item, keep_from_item, position = whole_numbers(storage.where(file), document, keys)
    return ConsumerState(epoch, next_item, keep_from_item, position, updated)
