"""A claim in an object store, which has no locks: a file whose number and beat only ever grow.

    _claim/000000007.json   {"run": ..., "who": ..., "beat": n, "released": false}

Whoever has put the highest number holds the store; a number is put only where none stands, so one
of several takers wins. The holder raises its beat every `BEAT_S`. Who finds a beat that stands
still for `STALE_S`, by its own clock, puts the next number; the old holder, if it lives after all,
sees that at its next beat and stops.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import Any

from activation_store.errors import MissingDataError, StorageError, StoreBusyError, StoreFormatError
from activation_store.sealed import parse_json
from activation_store.storage import Held, Storage

BEAT_S = 5.0
STALE_S = 40.0
CLAIM = "_claim"
_FILE_BYTES = 1 << 16
_FILE = re.compile(r"(\d{9})\.json")


class Lease(Held):
    """A lease that is held; a thread of its own keeps its beat.

    Args:
        storage: Of the store.
        run: Its earlier attempts are dead: their lease is taken over at once.
        who: For the messages that others get.

    Raises:
        StoreBusyError: Another run's beats.
    """

    def __init__(self, storage: Storage, run: str, who: str) -> None:
        self._storage = storage
        self._state: dict[str, Any] = {"run": run, "who": who, "beat": 0, "released": False}
        self._number = self._take()
        self._lost_to: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store-claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost_to is not None:
            raise StoreBusyError(
                f"{self._storage.path} was taken over by {self._lost_to}: this process had not "
                f"been heard of for {STALE_S:g} s; what it committed stays"
            )

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._lost_to is None:
            with contextlib.suppress(StorageError):  # then it is found stale
                self._put(released=True)

    def _take(self) -> int:
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
            # Others came and went since `newest` was looked up, and left this number free again.
            self._storage.delete(_name(number))
        for old in numbers:
            if old < number:
                self._storage.delete(_name(old))
        return number

    def _wait_until_free(self, number: int) -> None:
        """Returns once the holder of `number` is gone. Raises: StoreBusyError: It lives."""
        first = _read(self._storage, number)
        deadline = time.monotonic() + STALE_S
        found = first
        while found and not found.get("released") and found.get("run") != self._state["run"]:
            if found != first:
                raise StoreBusyError(
                    f"{self._storage.path} is being filled by {found.get('who')}: expected nobody; "
                    "wait for it or end it"
                )
            if time.monotonic() > deadline:
                return
            time.sleep(min(BEAT_S / 4, 1.0))
            found = _read(self._storage, number)

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                newest = _newest(self._storage)
                if newest > self._number:
                    self._lost_to = str(_read(self._storage, newest).get("who", "another run"))
                    return
                self._put()
            except StorageError:
                continue  # the server is away: others cannot take it over just now either
            except Exception as error:
                self._lost_to = f"somebody, perhaps: its beat failed with {error!r}"
                return

    def _put(self, released: bool = False) -> None:
        self._state = {**self._state, "beat": self._state["beat"] + 1, "released": released}
        self._storage.put(_name(self._number), [self._bytes()])

    def _bytes(self) -> bytes:
        return json.dumps(self._state).encode()


def _name(number: int) -> str:
    return f"{CLAIM}/{number:09d}.json"


def _numbers(storage: Storage) -> list[int]:
    return [int(match[1]) for match in map(_FILE.fullmatch, storage.names(CLAIM)) if match]


def _newest(storage: Storage) -> int:
    return max(_numbers(storage), default=0)


def _read(storage: Storage, number: int) -> dict[str, Any]:
    """Empty where nobody's name can be read in it."""
    try:
        return parse_json(storage.where(_name(number)), storage.read(_name(number), _FILE_BYTES))
    except (MissingDataError, StoreFormatError):
        return {}
