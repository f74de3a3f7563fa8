"""Cursors: how far each consumer of a growing store has read.

    _consumers/<name>.json   one small checksummed JSON file per consumer, replaced atomically

Producers wait for the slowest consumer, and deletion keeps what any consumer still needs. A
consumer can register only if it needs no rows that are deleted or about to be deleted. No lock is
needed to ensure this. A consumer first writes its cursor file and then reads the deletion mark
(`deletion_mark.py`). The deleting process first announces the deletion and then reads the cursor
files. So at least one of the two processes sees what the other has written.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from activation_store.consumers.deletion_mark import deleted_error, read_deletion_mark
from activation_store.errors import MissingDataError, StoreFormatError
from activation_store.format import commit_log
from activation_store.storage.base import Storage
from activation_store.storage.checksummed_json import (
    dump_checksummed,
    read_checksummed,
    whole_numbers,
)
from activation_store.storage.open import open_storage
from foundation.errors import ConfigError

CONSUMERS = "_consumers"
_FILE_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}")


@dataclass(frozen=True)
class ConsumerState:
    """Progress of a consumer."""

    epoch: int = 0
    """Epoch that the consumer is reading."""
    next_item: int = 0
    """In epoch 0: first item that the consumer has not passed, always the start of a window. In
    later epochs: the number of items."""
    keep_from_item: int = 0
    """First item that the consumer may still need, even if it resumes from its oldest kept
    checkpoint."""
    position: int = 0
    """Position of the consumer's stream: number of the next batch."""
    updated: float = 0.0
    """Time of the last update, in seconds since 1970 (UTC)."""


class Consumer:
    """A registered consumer, owned by the process that decides which checkpoints are kept.

    If a consumer is already registered under this name, this one continues from the saved state. A
    consumer that died blocks the producers until it is restarted, or until `remove_consumer`
    unregisters it.

    Args:
        path: Path of the store.
        name: Name of the consumer, unique within the store: at most 200 letters, digits, '_', '-'
            or '.', starting with a letter or digit and without '..'.
        keep_from_item: First item that a new consumer may need.

    Raises:
        ConfigError: If the name is invalid.
        DeletedDataError: If the consumer would need rows that were deleted.
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
        """Save the progress of this consumer. Call this once per window, not for every batch.

        All ranks of the consumer must have passed `position`, so publish the position of the
        slowest rank. A run of more than one epoch must keep all items (`keep_from_item=0`).

        Args:
            epoch: Epoch that the consumer is reading.
            next_item: `stream.first_item_needed(position)` in epoch 0, and the number of items in
                later epochs.
            keep_from_item: `stream.first_item_needed` of the oldest kept checkpoint.
            position: Position of the consumer's stream.

        Raises:
            ConfigError: If a number is negative.
            DeletedDataError: If the consumer would move back to items that were deleted. The saved
                state then remains unchanged.
        """
        self._put(ConsumerState(epoch, next_item, keep_from_item, position))

    def close(self) -> None:
        """Unregister this consumer, so that it no longer blocks producers or deletion."""
        self._storage.delete(self._file)

    def _put(self, state: ConsumerState) -> None:
        """Write the cursor file, and undo the change if the state needs rows that are deleted."""
        for key, value in asdict(state).items():
            if value < 0:
                raise ConfigError(key, value, "at least 0")
        before: ConsumerState | None = getattr(self, "state", None)
        state = replace(state, updated=time.time())
        # Write the cursor before reading the deletion mark; the module docstring explains why.
        self._write(state)
        mark = read_deletion_mark(self._storage)
        if state.keep_from_item < mark.announced:
            if before and before.keep_from_item >= mark.announced:
                self._write(before)
            else:
                self.close()
            needs = f"consumer {self.name!r} from item {state.keep_from_item} on"
            raise deleted_error(self._storage, needs, mark)
        self.state = state

    def _write(self, state: ConsumerState) -> None:
        self._storage.put(self._file, [dump_checksummed(asdict(state))])


def list_consumers(path: str | Path | Storage) -> dict[str, ConsumerState]:
    """Return the registered consumers of a store, as {name: state}.

    Raises:
        DamagedDataError: If a cursor file fails its checksum. The message names the file.
        StoreFormatError: If a cursor file is invalid. The message names the file.
    """
    storage = open_storage(path)
    found = {}
    for name in consumer_names(storage):
        try:
            found[name] = read_state(storage, name)
        except MissingDataError:
            continue  # unregistered since the files were listed
    return found


def consumer_names(storage: Storage) -> list[str]:
    """Return the sorted names of the registered consumers, ignoring other files in the folder."""
    files = [file for file in storage.names(CONSUMERS) if file.endswith(".json")]
    names = [file.removesuffix(".json") for file in files]
    return sorted(name for name in names if _NAME.fullmatch(name))


def remove_consumer(path: str | Path, name: str) -> None:
    """Unregister a dead consumer so that it no longer blocks producers or deletion.

    Raises:
        ConfigError: If no consumer with this name is registered.
    """
    storage = open_storage(path)
    if not storage.exists(_file(name)):
        raise ConfigError(
            "consumer", name, f"a registered consumer, one of {sorted(list_consumers(path))}"
        )
    storage.delete(_file(name))


def lead_items(path: str | Path) -> int | None:
    """Return the number of items by which the producers are ahead of the slowest consumer.

    All committed items count, including those after a missing item. A window becomes readable only
    when all of its items are committed, so a limit on the lead must allow at least one window plus
    the items that are being harvested.

    Returns:
        The number of items, or None if no consumer is registered.
    """
    states = list_consumers(path)
    if not states:
        return None
    return commit_log.count(open_storage(path)) - min(state.next_item for state in states.values())


def _file(name: str) -> str:
    """Return the path of a consumer's cursor file, after checking the name."""
    if not _NAME.fullmatch(name) or ".." in name:
        expected = (
            "at most 200 letters, digits, '_', '-' or '.', starting with a letter or digit and "
            "without '..'"
        )
        raise ConfigError("consumer", name, expected)
    return f"{CONSUMERS}/{name}.json"


def read_state(storage: Storage, name: str) -> ConsumerState:
    """Read the state of one consumer.

    Raises:
        MissingDataError: If no consumer with this name is registered.
        DamagedDataError: If the cursor file fails its checksum.
        StoreFormatError: If the cursor file is invalid.
    """
    file = _file(name)
    document = read_checksummed(storage, file, _FILE_BYTES)
    updated = document.pop("updated", None)
    if not isinstance(updated, float):
        raise StoreFormatError(
            f"{storage.where(file)} is not a valid cursor; unregister the consumer with "
            "activation_store.remove_consumer"
        )
    keys = ("epoch", "next_item", "keep_from_item", "position")
    epoch, next_item, keep_from_item, position = whole_numbers(storage.where(file), document, keys)
    return ConsumerState(epoch, next_item, keep_from_item, position, updated)
