"""The one interface through which a store's bytes go: a folder, or a prefix in an object store.

Names are relative to the store, with '/' between their parts. What is put is there whole or not at
all, and durable when the call returns, but for the names that `put_if_absent` gives: those are
durable after `sync` of their folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from activation_store.files import Bytes

Parts = Iterable[bytes | Bytes]
"""The pieces of an object, one after the other; never copied on a local disk."""
OBJECT_SCHEME = "s3://"


class ReadHandle(ABC):
    """One object, open to be read in ranges by several threads."""

    size: int
    """Bytes, when it was opened."""

    @abstractmethod
    def read_into(self, views: list[Bytes], offset: int) -> bool:
        """Fills `views` one after the other with the bytes from `offset` on; False if too few."""


class Held(ABC):
    """A claim that is held; see `claim.py`."""

    @abstractmethod
    def check(self) -> None:
        """Raises: StoreBusyError: It is somebody else's by now."""

    @abstractmethod
    def release(self) -> None:
        """Lets go of it."""


class Storage(ABC):
    """Where a store lies."""

    path: Path | str
    """As a user would write it: a folder, or s3://bucket/prefix."""
    run_bytes: int
    """Neighbouring chunks are read in one call up to so many bytes."""
    n_threads: int
    """Most requests that are worth having under way at once."""
    gap_bytes: int
    """So many bytes that nobody wants are read along rather than asking twice."""
    poll_s: float
    """How often to look whether a growing store has grown."""
    build_is_atomic: bool
    """Whether `build` shows others a whole store or none."""

    def where(self, name: str) -> str:
        """`name` as messages give it."""
        return f"{self.path}/{name}"

    @abstractmethod
    def read(self, name: str, limit_bytes: int) -> bytes:
        """A small object, whole.

        Raises:
            MissingDataError: It is not there.
            StoreFormatError: It is larger than `limit_bytes`.
        """

    @abstractmethod
    def open(self, name: str) -> ReadHandle:
        """An object to read ranges of. Raises: MissingDataError: It is not there."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the object is there."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names, without the folder's, of what lies directly in it; empty if it is not there."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Whether the folder is there; where there are no folders, always."""

    @abstractmethod
    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Makes an empty store of all that is given, unless somebody else is faster.

        Args:
            folders: To make, where there are folders.
            objects: Name to content.
            last: Name and content of the object that makes it a store: others see all or none.

        Raises:
            StoreFormatError: Something else is there already.
        """

    @abstractmethod
    def put(self, name: str, parts: Parts) -> None:
        """Puts an object in its place, whether or not something stands there."""

    @abstractmethod
    def put_if_absent(self, name: str, parts: Parts) -> bool:
        """Puts an object in its place unless another one stands there: then False.

        True where an earlier try of this very call has put it and its answer was lost. May be True
        or False where an object of the same bytes stands there.
        """

    @abstractmethod
    def make_folder(self, name: str) -> None:
        """Makes a folder, and its name durable; where there are no folders, nothing."""

    @abstractmethod
    def sync(self, folders: Sequence[str]) -> None:
        """Makes the names in these folders durable."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes an object; nothing where it is not there."""

    @abstractmethod
    def is_stale(self, name: str) -> bool:
        """Whether a shard that is not committed is nobody's work under way.

        To be asked with the exclusive lock held.
        """

    @abstractmethod
    def remove_stale(self) -> list[str]:
        """Removes what writers that died long ago left half written; its names."""

    @abstractmethod
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Held by many while they commit, or by one alone while it repairs.

        Args:
            exclusive: Alone.
            timeout_s: How long to wait for the others; None without end.

        Raises:
            StoreBusyError: The others are not done in time.
        """

    @abstractmethod
    def claim(self, run: str, who: str) -> Held:
        """Makes this process the one that fills the store.

        Args:
            run: The same for every attempt of one run, of which only one lives at a time.
            who: For the messages that others get.

        Raises:
            StoreBusyError: Another one does; names it.
        """


def open_storage(path: str | Path | Storage) -> Storage:
    """The storage of a store: s3://bucket/prefix, or a folder.

    Raises:
        StoreConfigError: An address that cannot be.
    """
    if isinstance(path, Storage):
        return path
    if str(path).startswith(OBJECT_SCHEME):
        from activation_store.storage_object import ObjectStorage  # not every user has obstore

        return ObjectStorage(str(path))
    from activation_store.storage_local import LocalStorage

    return LocalStorage(Path(path))
