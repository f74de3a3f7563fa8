"""The harvest lock in an object store: a lease that is renewed, because there are no file locks.

    _claim/000000007.json   {"run": ..., "who": ..., "beat": n, "released": false}

The process that wrote the file with the highest number holds the lease. A file is created only if
its number is free, so only one of several competing processes succeeds. The holder renews the lease
with heartbeats: it increases "beat" every `HEARTBEAT_S` seconds. If another process sees no
heartbeat for `STALE_S` seconds on its own clock, it takes the lease over by creating the file with
the next number. If the old holder is still alive, it notices the higher number at its next
heartbeat and stops.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import Any

from activation_store.errors import MissingDataError, StorageError, StoreBusyError, StoreFormatError
from activation_store.storage.base import HeldLock, Storage
from activation_store.storage.checksummed_json import parse_json

HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
STALE_S = 40.0
"""Seconds without a heartbeat after which another run may take the lease over."""
HARVEST_LOCK = "_claim"
_FILE_BYTES = 1 << 16
_FILE = re.compile(r"(\d{9})\.json")


class Lease(HeldLock):
    """A held lease, whose heartbeats are sent by a background thread.

    Args:
        storage: Storage of the store.
        run: Name of the run. Earlier attempts of the same run are assumed to be dead, so their
            lease is taken over immediately.
        who: Description of this process, for error messages in other processes.

    Raises:
        StoreBusyError: If another run holds the lease and sends heartbeats.
    """

    def __init__(self, storage: Storage, run: str, who: str) -> None:
        self._storage = storage
        self._state: dict[str, Any] = {"run": run, "who": who, "beat": 0, "released": False}
        self._number = self._take()
        self._taken_over_by: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store-harvest-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StoreBusyError if another process has taken the lease over."""
        if self._taken_over_by is not None:
            raise StoreBusyError(
                f"{self._storage.path} was taken over by {self._taken_over_by}, either because a "
                "new attempt of the same run started, or because this process sent no heartbeat "
                f"for {STALE_S:g} s; committed items are kept; check that no other harvest of the "
                "store is running, then rerun"
            )

    def release(self) -> None:
        """Stop the heartbeats and mark the lease as released."""
        self._stop.set()
        self._thread.join()
        if self._taken_over_by is None:
            # If this request fails, the lease simply expires.
            with contextlib.suppress(StorageError):
                self._put(released=True)

    def _take(self) -> int:
        """Acquire the lease and return its number."""
        while True:
            newest = _newest(self._storage)
            if newest:
                self._wait_until_free(newest)
            number = newest + 1
            if not self._storage.put_if_absent(_name(number), [self._bytes()]):
                continue
            numbers = _numbers(self._storage)
            if max(numbers, default=0) == number:
                break
            # Since `newest` was read, another process took and released the lease. Then a third
            # process took the lease and deleted the file with this number, which was therefore free
            # but is not the highest.
            self._storage.delete(_name(number))
        for old in numbers:
            if old < number:
                self._storage.delete(_name(old))
        return number

    def _wait_until_free(self, number: int) -> None:
        """Wait until the lease with this number is released or expired, or belongs to this run.

        Raises:
            StoreBusyError: If the holder sends a heartbeat.
        """
        first = _read(self._storage, number)
        deadline = time.monotonic() + STALE_S
        found = first
        while found and not found.get("released") and found.get("run") != self._state["run"]:
            if found != first:
                raise StoreBusyError(
                    f"{self._storage.path} is being written by {found.get('who')}; wait for it to "
                    "finish, or stop it"
                )
            if time.monotonic() > deadline:
                return
            time.sleep(min(HEARTBEAT_S / 4, 1.0))
            found = _read(self._storage, number)

    def _keep(self) -> None:
        """Send heartbeats until the lease is released or lost, in the background thread."""
        while not self._stop.wait(HEARTBEAT_S):
            try:
                newest = _newest(self._storage)
                if newest > self._number:
                    self._taken_over_by = str(
                        _read(self._storage, newest).get("who", "another run")
                    )
                    return
                self._put()
            except StorageError:
                continue  # the server is unreachable, so no other process can take the lease either
            except Exception as error:  # a thread has no caller to raise to
                self._taken_over_by = f"another process (assumed: heartbeat failed with {error!r})"
                return

    def _put(self, released: bool = False) -> None:
        """Increase "beat" and write the lease file."""
        self._state = {**self._state, "beat": self._state["beat"] + 1, "released": released}
        self._storage.put(_name(self._number), [self._bytes()])

    def _bytes(self) -> bytes:
        return json.dumps(self._state).encode()


def _name(number: int) -> str:
    return f"{HARVEST_LOCK}/{number:09d}.json"


def _numbers(storage: Storage) -> list[int]:
    return [int(match[1]) for match in map(_FILE.fullmatch, storage.names(HARVEST_LOCK)) if match]


def _newest(storage: Storage) -> int:
    return max(_numbers(storage), default=0)


def _read(storage: Storage, number: int) -> dict[str, Any]:
    """Read a lease file; return {} if the file is missing or not valid JSON."""
    try:
        return parse_json(storage.where(_name(number)), storage.read(_name(number), _FILE_BYTES))
    except (MissingDataError, StoreFormatError):
        return {}
