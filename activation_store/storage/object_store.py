"""Storage under a prefix of an S3-compatible object store, accessed through `obstore`.

As for every S3 client, the endpoint and credentials come from the environment: AWS_ENDPOINT_URL
(not needed for AWS itself), AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or other
sources that obstore supports (instance and container roles, web identity).

Objects are written atomically. Objects that must be written only once (commit records and shards)
are put with `If-None-Match: *`. If the answer to such a put is lost, the retry finds an existing
object and compares its bytes. If the bytes are equal, the first try is taken to have succeeded.

Use a store only in the process that opened it, because obstore's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from activation_store.config import OBJECT_SCHEME
from activation_store.errors import MissingDataError, StorageError, StoreFormatError
from activation_store.storage.atomic_files import STALE_S, Bytes
from activation_store.storage.base import HeldLock, Parts, ReadHandle, Storage
from activation_store.storage.lease import Lease
from foundation.errors import ConfigError

T = TypeVar("T")

TRIES = 5
"""Number of tries per request. In each try, obstore retries safe requests up to `_RETRIES`
times."""
_BACKOFF_S = 0.2
_RETRIES = 3
_CONNECT_S, _STALL_S, _REQUEST_S = 10, 120, 1200
"""Timeouts in seconds for a connection, for the next bytes, and for a whole request.

A whole request may transfer a shard over a slow link.
"""
_PROBE = "_probe"
_MOST_BYTES = 5 << 30  # limit of S3 for a single put
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])/([\w.\-=+/]*[\w\-=+])/?")


class ObjectStorage(Storage):
    """Storage under s3://bucket/prefix.

    Args:
        url: Address of the store, whose bucket must exist.

    Raises:
        ConfigError: If the address is invalid or contains credentials.
    """

    run_bytes = 8 << 20
    gap_bytes = 512 << 10
    n_threads = 16
    poll_s = 2.0
    build_is_atomic = False

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        if not match or ".." in url:
            shown = url if "@" not in url else f"{OBJECT_SCHEME}(with credentials)"
            raise ConfigError(
                "store.path",
                shown,
                "s3://bucket/prefix, without credentials, and with a prefix of letters, digits and "
                "'_-.=+/' that contains no '..'",
                "if credentials or an endpoint are needed, set them in AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
            )
        self.path: str = url.rstrip("/")
        self._store = _connect(match[1], match[2])

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a whole object."""

        def get() -> bytes:
            answer = obstore.get(self._store, name)
            size = answer.meta["size"]
            if size > limit_bytes:
                raise StoreFormatError(
                    f"{self.where(name)} has {size} bytes: expected at most {limit_bytes}; "
                    "this file was not written by activation_store"
                )
            return bytes(answer.bytes())

        try:
            return self._ask("get", name, get)
        except FileNotFoundError:
            raise self._missing(name) from None

    def open(self, name: str) -> ReadHandle:
        """Open an object for reading ranges of its bytes."""
        meta = self._head(name)
        if meta is None:
            raise MissingDataError(
                f"{self.where(name)} is committed but missing; repair the store with "
                "stage=repair, or restore the object from a backup"
            )
        return _Object(self, name, meta["size"])

    def read_range(self, name: str, offset: int, n_bytes: int) -> Bytes:
        """Read bytes [offset, offset + n_bytes) of an object that has at least that many bytes."""

        def get() -> Bytes:
            answer = obstore.get_range(self._store, name, start=offset, length=n_bytes)
            return np.frombuffer(memoryview(answer), np.uint8)

        try:
            return self._ask("get", name, get)
        except FileNotFoundError:
            raise self._missing(name) from None

    def exists(self, name: str) -> bool:
        """Return whether the object exists."""
        return self._head(name) is not None

    def names(self, folder: str) -> list[str]:
        """List the names directly under a prefix."""

        def listing() -> list[str]:
            found = obstore.list_with_delimiter(self._store, folder or None)
            objects = [str(part["path"]) for part in found["objects"]]
            return [*objects, *found["common_prefixes"]]

        paths = self._ask("list", folder, listing)
        return [path.rpartition("/")[2] for path in paths]

    def is_folder(self, name: str) -> bool:
        """Return True, because prefixes need not be created."""
        return True

    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """Create the store, writing `last` first.

        Only the process that succeeds in writing this object creates the store. If the process dies
        before it has written the other objects, the next writer adds them.
        """
        marker, content = last
        if set(self.names("")) - {_PROBE} and not self.exists(marker):
            raise StoreFormatError(
                f"{self.path} holds objects but is not an activation store; use an empty prefix"
            )
        self._require_conditional_put()
        if self.put_if_absent(marker, [content]):
            for name, data in objects.items():
                self.put_if_absent(name, [data])

    def _require_conditional_put(self) -> None:
        """Check that the server supports conditional puts.

        If a server ignored the condition, two attempts could commit the same item.

        Raises:
            StorageError: If the server ignores the condition.
        """
        name = f"{_PROBE}/{uuid.uuid4().hex}"
        self.put_if_absent(name, [b"first"])
        twice = self.put_if_absent(name, [b"second"])
        self.delete(name)
        if twice:
            raise StorageError(
                f"{self.path}: the server ignores If-None-Match, so commits could overwrite each "
                "other; use a server that supports it, or a local folder"
            )

    def put(self, name: str, parts: Parts) -> None:
        """Write an object, replacing any existing object of this name."""
        data = self._join(name, parts)
        self._ask("put", name, lambda: obstore.put(self._store, name, data, use_multipart=False))

    def put_if_absent(self, name: str, parts: Parts) -> bool:
        """Write an object unless an object of this name exists."""
        data = self._join(name, parts)

        def create() -> bool:
            try:
                obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._ask("put", name, create) or self._holds(name, data)

    def _holds(self, name: str, data: bytes) -> bool:
        """Return whether an object has exactly the bytes `data`.

        If so, an earlier try of the same put is taken to have succeeded, with only its answer lost.
        """
        meta = self._head(name)
        if meta is None or meta["size"] != len(data):
            return False
        return not data or self.read_range(name, 0, len(data)).tobytes() == data

    def make_folder(self, name: str) -> None:
        """Do nothing, because object stores have no folders."""

    def sync(self, folders: Sequence[str]) -> None:
        """Do nothing, because a put is durable when it returns."""

    def delete(self, name: str) -> None:
        """Delete an object if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", name, lambda: obstore.delete(self._store, name))

    def is_stale(self, name: str) -> bool:
        """Return whether an uncommitted shard is older than `STALE_S`, because there is no lock."""
        meta = self._head(name)
        return meta is not None and _age_s(meta) > STALE_S

    def remove_stale(self) -> list[str]:
        """Return [], because objects are written atomically and so are never unfinished."""
        return []

    @contextlib.contextmanager
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> Iterator[None]:
        """Do nothing, because object stores have no locks; `is_stale` relies on age instead."""
        yield

    def harvest_lock(self, run: str, who: str) -> HeldLock:
        """Take the harvest lock, which is a lease."""
        return Lease(self, run, who)

    def _head(self, name: str) -> Any | None:
        """Return the metadata of an object, or None if the object does not exist."""
        try:
            return self._ask("head", name, lambda: obstore.head(self._store, name))
        except FileNotFoundError:
            return None

    def _join(self, name: str, parts: Parts) -> bytes:
        """Join the parts of an object, and check the size limit of a put."""
        data = b"".join(part if isinstance(part, bytes) else part.data for part in parts)
        if len(data) > _MOST_BYTES:
            raise StorageError(
                f"{self.where(name)} would be {len(data)} bytes: expected at most {_MOST_BYTES}, "
                "the limit for a single S3 PUT; lower store.shard_tokens"
            )
        return data

    def _missing(self, name: str) -> MissingDataError:
        return MissingDataError(f"{self.where(name)} is missing; restore it from a backup")

    def _ask(self, what: str, name: str, request: Callable[[], T]) -> T:
        """Send a request, with retries, and return its result.

        Args:
            what: Name of the operation, for the error message.
            name: Name of the object, for the error message.
            request: Function that sends the request, and that may be called repeatedly.

        Raises:
            FileNotFoundError: If the object does not exist.
            StorageError: If the server refuses the request, or if no try of `TRIES` succeeds.
        """
        problem = ""
        for number in range(TRIES):
            if number:
                time.sleep(_BACKOFF_S * 2**number * random.uniform(0.5, 1.0))
            try:
                return request()
            except (BaseError, FileNotFoundError) as error:
                problem = _summary(error)
                if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in problem:
                    raise
                if isinstance(
                    error, FileNotFoundError | PermissionDeniedError | UnauthenticatedError
                ):
                    break  # a retry would fail in the same way
        # Raise outside the except block, so that the original error is not chained. The text of
        # that error may contain credentials from the endpoint's address.
        raise StorageError(
            f"{self.where(name)}: {what} failed: {problem}; expected a reachable bucket with write "
            "access; check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _connect(bucket: str, prefix: str) -> S3Store:
    """Create a client from the settings in the environment, without sending a request."""
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    plain = any(os.environ.get(name, "").startswith("http://") for name in endpoints)
    try:
        return S3Store(
            bucket,
            prefix=prefix,
            client_options={
                "allow_http": plain,
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "read_timeout": timedelta(seconds=_STALL_S),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=60),
                "backoff": {
                    "init_backoff": timedelta(seconds=_BACKOFF_S),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError) as error:
        source = re.search(r"source: (\w+)", str(error))
        problem = source[1] if source else type(error).__name__
    given = sorted(name for name in os.environ if name.startswith("AWS_"))
    raise ConfigError(
        "AWS_*",
        given,
        f"a complete and valid set of variables ({problem})",
        "set those that are missing, and correct those that are invalid",
    )


class _Object(ReadHandle):
    """An open object, which sends one range request per read."""

    def __init__(self, storage: ObjectStorage, name: str, size: int) -> None:
        self._storage = storage
        self._name = name
        self.size = size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
        """Read the bytes from `offset` onwards into `views`."""
        n_bytes = sum(map(len, views))
        if offset + n_bytes > self.size:
            return False
        if not n_bytes:
            return True
        data = self._storage.read_range(self._name, offset, n_bytes)
        if len(data) < n_bytes:
            return False
        start = 0
        for view in views:
            view[:] = data[start : start + len(view)]
            start += len(view)
        return True


def _age_s(meta: Any) -> float:
    age: timedelta = datetime.now(UTC) - meta["last_modified"]
    return age.total_seconds()


def _summary(error: BaseException) -> str:
    """Summarise an error without any address, which might contain credentials."""
    text = str(error)
    status = re.search(r"status code: (\d+)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    parts = [f"HTTP {status[1]}" if status else "no answer, or an incomplete one"]
    return " ".join(parts + ([code[1]] if code else []))
