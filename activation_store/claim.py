"""The right to fill a store and to delete from it: one run's at a time.

Rows are safe without it, for items are committed once and are pure functions of their number. It
keeps two harvests from doing the same work, from each holding back for its own trainer alone, and
from deleting at the same time.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from activation_store.storage import Held, open_storage


class Claim:
    """A run's claim; a context manager that lets go of it.

    On a file system it is the kernel's lock, which a death lets go of. In an object store it is a
    lease (see `lease.py`): one that died is taken over after `lease.STALE_S`, by the same run at
    once.

    Args:
        path: Of the store.
        run: The same for every attempt of one run, of which the caller lets only one live.
    """

    def __init__(self, path: str | Path, run: str) -> None:
        self._storage, self._run = open_storage(path), run
        self._held: Held | None = None

    @property
    def is_taken(self) -> bool:
        """Whether `take` has succeeded."""
        return self._held is not None

    def take(self) -> None:
        """Takes it, once the store exists; nothing where it is taken already.

        Raises:
            StoreBusyError: Another one has it; names that one.
        """
        if self._held is None:
            who = f"run {self._run}, process {os.getpid()} on {socket.gethostname()}"
            self._held = self._storage.claim(self._run, who)

    def check(self) -> None:
        """Raises: StoreBusyError: Somebody took it over: this process was silent for too long."""
        if self._held is not None:
            self._held.check()

    def release(self) -> None:
        """Lets go of it; may be repeated."""
        held, self._held = self._held, None
        if held is not None:
            held.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
