"""Storage interface of a store; implemented by a folder and by a prefix in an object store.

Names are paths relative to the store, with '/' between their parts. Writes are atomic, and durable
when the call returns. One exception: a file created by `put_if_absent` is durable only after `sync`
of its folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from activation_store.storage.atomic_files import Bytes

Parts = Iterable[bytes | Bytes]
"""The content of an object in pieces, which are written one after the other."""
OBJECT_SCHEME = "s3://"


class ReadHandle(ABC):
    """An open object, of which several threads may read ranges at the same time."""

    size: int
    """Size in bytes at the time of opening."""

    @abstractmethod
    def read_into(self, views: list[Bytes], offset: int) -> bool:
        """Read the bytes from `offset` on into `views`, one after the other.

        Returns:
            False if the object ends before all views are full.
        """


class HeldLock(ABC):
    """A held harvest lock; see `harvest_lock.py`."""

    @abstractmethod
    def check(self) -> None:
        """Check that the lock is still held.

        Raises:
            StoreBusyError: If another process has taken it over.
        """

    @abstractmethod
    def release(self) -> None:
        """Release the lock."""


class Storage(ABC):
    """Place where the files (objects) of a store are kept."""

    path: Path | str
    """Address of the store as a user writes it: a folder, or s3://bucket/prefix."""
    run_bytes: int
    """Adjacent chunks are coalesced into reads of at most this many bytes."""
    n_threads: int
    """Number of requests that should be in progress at the same time."""
    gap_bytes: int
    """Read through gaps up to this size instead of issuing a second request."""
    poll_s: float
    """Seconds to wait between two checks of a growing store."""
    build_is_atomic: bool
    """True if a store that is being created by `build` is invisible until it is complete."""

    def where(self, name: str) -> str:
        """Return the full path of `name`, for error messages."""
        return f"{self.path}/{name}"

    @abstractmethod
    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a whole object.

        Raises:
            MissingDataError: If it does not exist.
            StoreFormatError: If it is larger than `limit_bytes`.
        """

    @abstractmethod
    def open(self, name: str) -> ReadHandle:
        """Open an object to read ranges of it.

        Raises:
            MissingDataError: If it does not exist.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether the object exists."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """List the names directly inside a folder, without its path; [] if it does not exist."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Return whether the folder exists; always True for object stores."""

    @abstractmethod
    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Create an empty store; do nothing if another process has created it already.

        Args:
            folders: Folders to create; ignored by object stores.
            objects: Name to content of the objects to create.
            last: Name and content of the object whose existence marks the store.

        Raises:
            StoreFormatError: If the path holds anything but an activation store.
        """

    @abstractmethod
    def put(self, name: str, parts: Parts) -> None:
        """Write an object, replacing an existing one."""

    @abstractmethod
    def put_if_absent(self, name: str, parts: Parts) -> bool:
        """Write an object unless one of this name exists.

        Returns:
            True if this call has created the object, also if the server's answer to an earlier
            attempt within this call was lost. False if another object exists. If an object with the
            same bytes existed before, either may be returned.
        """

    @abstractmethod
    def make_folder(self, name: str) -> None:
        """Create a folder durably if it does not exist; does nothing in object stores."""

    @abstractmethod
    def sync(self, folders: Sequence[str]) -> None:
        """Make the names in these folders durable."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object if it exists."""

    @abstractmethod
    def is_stale(self, name: str) -> bool:
        """Return whether an uncommitted shard is left over, so that no writer will commit it.

        The caller must hold the exclusive commit lock.
        """

    @abstractmethod
    def remove_stale(self) -> list[str]:
        """Remove unfinished files of writers that died long ago, and return their names."""

    @abstractmethod
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Hold the commit lock: writers share it while they commit, a repair holds it exclusively.

        Args:
            exclusive: True to exclude all other holders.
            timeout_s: Seconds to wait for other holders; None waits without limit.

        Raises:
            StoreBusyError: If the other holders do not release the lock in time.
        """

    @abstractmethod
    def harvest_lock(self, run: str, who: str) -> HeldLock:
        """Take the harvest lock; see `harvest_lock.py`.

        Args:
            run: Name of the run, the same for all of its attempts, of which only one is alive.
            who: Description of this process, for the error messages of others.

        Raises:
            StoreBusyError: If another process holds it; the message names that process.
        """
