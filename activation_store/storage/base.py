"""Interface to the storage of a store, which is a folder or a prefix in an object store.

Names are paths relative to the store, with '/' between their parts. Writes are atomic, and they are
durable when the call returns. There is one exception: a file created by `put_if_absent` is durable
only after `sync` has been called for its folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from activation_store.storage.atomic_files import Bytes

Parts = Iterable[bytes | Bytes]
"""The content of an object, as buffers that are written one after the other."""


class ReadHandle(ABC):
    """An open object. Several threads may read ranges of the object concurrently."""

    size: int
    """Size in bytes at the time of opening."""

    @abstractmethod
    def read_into(self, views: list[Bytes], offset: int) -> bool:
        """Read the bytes from `offset` onwards into `views`, one view after the other.

        Returns:
            False if the object ends before all views are full.
        """


class HeldLock(ABC):
    """A held harvest lock; see `harvest_lock.py`."""

    @abstractmethod
    def check(self) -> None:
        """Check that the lock is still held.

        Raises:
            StoreBusyError: If another process has taken the lock over.
        """

    @abstractmethod
    def release(self) -> None:
        """Release the lock."""


class Storage(ABC):
    """Place where the files (objects) of a store are kept."""

    path: Path | str
    """Address of the store in the form that users write: a folder, or s3://bucket/prefix."""
    run_bytes: int
    """Maximum size in bytes of a read of several adjacent chunks."""
    n_threads: int
    """Recommended number of concurrent requests."""
    gap_bytes: int
    """Maximum size in bytes of a gap to read through instead of issuing a second request."""
    poll_s: float
    """Seconds to wait between two checks of a growing store."""
    build_is_atomic: bool
    """Whether a store created by `build` is invisible until the store is complete."""

    def where(self, name: str) -> str:
        """Return the full path of `name`, for error messages."""
        return f"{self.path}/{name}"

    @abstractmethod
    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a whole object.

        Raises:
            MissingDataError: If the object does not exist.
            StoreFormatError: If the object is larger than `limit_bytes`.
        """

    @abstractmethod
    def open(self, name: str) -> ReadHandle:
        """Open an object for reading ranges of its bytes.

        Raises:
            MissingDataError: If the object does not exist.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether the object exists."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """List the names directly inside a folder, without its path; [] if there is no folder."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Return whether the folder exists; always True for object stores."""

    @abstractmethod
    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Create an empty store; do nothing if another process has already created the store.

        Args:
            folders: Folders to create; ignored by object stores.
            objects: Objects to create, as {name: content}.
            last: Name and content of the object whose existence shows that the store exists.

        Raises:
            StoreFormatError: If the path holds anything other than an activation store.
        """

    @abstractmethod
    def put(self, name: str, parts: Parts) -> None:
        """Write an object, replacing any existing object of this name."""

    @abstractmethod
    def put_if_absent(self, name: str, parts: Parts) -> bool:
        """Write an object unless an object of this name exists.

        Returns:
            True if this call created the object, even if an attempt within this call succeeded but
            the server's answer was lost. False if an object with other bytes exists. Either value
            may be returned if an object with the same bytes already existed.
        """

    @abstractmethod
    def make_folder(self, name: str) -> None:
        """Create a folder durably if it does not exist; do nothing in object stores."""

    @abstractmethod
    def sync(self, folders: Sequence[str]) -> None:
        """Make the entries of these folders durable."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object if it exists."""

    @abstractmethod
    def is_stale(self, name: str) -> bool:
        """Return whether an uncommitted shard is left over and will not be committed any more.

        The caller must hold the exclusive commit lock.
        """

    @abstractmethod
    def remove_stale(self) -> list[str]:
        """Remove unfinished files of writers that died long ago, and return the files' names."""

    @abstractmethod
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Hold the commit lock, which writers share while they commit and a repair holds alone.

        Args:
            exclusive: True to exclude all other holders.
            timeout_s: Seconds to wait for other holders; None means no limit.

        Raises:
            StoreBusyError: If other holders do not release the lock in time.
        """

    @abstractmethod
    def harvest_lock(self, run: str, who: str) -> HeldLock:
        """Take the harvest lock; see `harvest_lock.py`.

        Args:
            run: Name of the run, the same for all attempts of the run. Only one attempt may be
                alive at a time.
            who: Description of this process, for error messages in other processes.

        Raises:
            StoreBusyError: If another process holds the lock. The message names that process.
        """
