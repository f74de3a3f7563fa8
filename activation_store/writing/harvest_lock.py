"""The harvest lock, which allows only one run at a time to write to a store and delete from it.

Rows are safe without this lock, because an item is committed at most once and is a pure function of
its number. But two concurrent harvests would do the same work twice, would each wait only for the
trainers of their own run, and could delete shards concurrently. The lock prevents this.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from activation_store.storage.base import HeldLock
from activation_store.storage.open import open_storage


class HarvestLock:
    """The harvest lock of a store. As a context manager, it releases the lock on exit.

    On a file system, this is a kernel file lock, which is released when the process dies. In an
    object store, it is a lease (see `lease.py`). After the holder of a lease has died, another run
    can take the lease over once `lease.STALE_S` seconds have passed. A new attempt of the same run
    can take the lease over immediately.

    Args:
        path: Path of the store.
        run: Name of the run, the same for all attempts of the run. The caller must ensure that only
            one attempt of a run is alive at a time.
    """

    def __init__(self, path: str | Path, run: str) -> None:
        self._storage = open_storage(path)
        self._run = run
        self._held: HeldLock | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._held is not None

    def acquire(self) -> None:
        """Take the lock; do nothing if this object already holds it. The store must exist.

        Raises:
            StoreBusyError: If another process holds the lock. The message names that process.
        """
        if self._held is None:
            who = f"run {self._run}, process {os.getpid()} on {socket.gethostname()}"
            self._held = self._storage.harvest_lock(self._run, who)

    def check(self) -> None:
        """Check that this process has not lost the lock; do nothing if it was never taken.

        Raises:
            StoreBusyError: If another process took the lease over, either as a new attempt of the
                same run, or because this process sent no heartbeat for too long.
        """
        if self._held is not None:
            self._held.check()

    def release(self) -> None:
        """Release the lock; do nothing if it is not held."""
        held = self._held
        self._held = None
        if held is not None:
            held.release()

    def __enter__(self) -> HarvestLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
