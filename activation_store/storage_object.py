"""A store under a prefix of an S3-compatible object store, through `obstore`.

Endpoint and credentials come from the environment, as for every S3 client: AWS_ENDPOINT_URL (none
for AWS itself), AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or what else obstore finds
(profile-less instance and container roles, web identity).

An object appears whole or not at all. What must be there once (a commit record, a shard) is put
with `If-None-Match: *`; where the answer to such a put is lost, the second try finds the object,
compares it with its own bytes and so knows that it was the first one that put it. Use a store from
the process that opened it: obstore's threads do not survive a fork.
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

from activation_store.errors import (
    MissingDataError,
    StorageError,
    StoreConfigError,
    StoreFormatError,
)
from activation_store.files import STALE_S, Bytes
from activation_store.lease import Lease
from activation_store.storage import OBJECT_SCHEME, Held, Parts, ReadHandle, Storage

T = TypeVar("T")

TRIES = 5
"""Of one request, each of which obstore itself may repeat `_RETRIES` times where that is safe."""
_BACKOFF_S = 0.2
_RETRIES = 3
_CONNECT_S, _STALL_S, _REQUEST_S = 10, 120, 1200
"""A connection, a wait for the next bytes, a whole request: a shard over a slow link."""
_PROBE = "_probe"
_MOST_BYTES = 5 << 30  # of one put, in S3
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])/([\w.\-=+/]*[\w\-=+])/?")


class ObjectStorage(Storage):
    """Objects under s3://bucket/prefix.

    Args:
        url: Of the store; the bucket exists.

    Raises:
        StoreConfigError: An address that cannot be, or holds credentials.
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
            raise StoreConfigError(
                "store.path",
                shown,
                "s3://bucket/prefix",
                "credentials and endpoint go into AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_ENDPOINT_URL",
            )
        self.path: str = url.rstrip("/")
        self._store = _connect(match[1], match[2])

    def read(self, name: str, limit_bytes: int) -> bytes:
        def get() -> bytes:
            answer = obstore.get(self._store, name)
            size = answer.meta["size"]
            if size > limit_bytes:
                raise StoreFormatError(
                    f"{self.where(name)} has {size} bytes: expected at most {limit_bytes}; "
                    "this is no metadata that activation_store wrote"
                )
            return bytes(answer.bytes())

        try:
            return self._ask("get", name, get)
        except FileNotFoundError:
            raise self._missing(name) from None

    def open(self, name: str) -> ReadHandle:
        meta = self._head(name)
        if meta is None:
            raise MissingDataError(f"{self.where(name)} is committed but missing; restore it")
        return _Object(self, name, meta["size"])

    def read_range(self, name: str, offset: int, n_bytes: int) -> Bytes:
        """Bytes [offset, offset + n_bytes) of an object that has so many."""

        def get() -> Bytes:
            answer = obstore.get_range(self._store, name, start=offset, length=n_bytes)
            return np.frombuffer(memoryview(answer), np.uint8)

        try:
            return self._ask("get", name, get)
        except FileNotFoundError:
            raise self._missing(name) from None

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def names(self, folder: str) -> list[str]:
        def listing() -> list[str]:
            found = obstore.list_with_delimiter(self._store, folder or None)
            objects = [str(part["path"]) for part in found["objects"]]
            return [*objects, *found["common_prefixes"]]

        paths = self._ask("list", folder, listing)
        return [path.rpartition("/")[2] for path in paths]

    def is_folder(self, name: str) -> bool:
        return True

    def build(
        self, folders: Sequence[str], objects: Mapping[str, bytes], last: tuple[str, bytes]
    ) -> None:
        """The object that makes it a store goes first: whoever puts it has made the store.

        One who dies then leaves a store without the others, which the next writer puts.
        """
        marker, content = last
        if set(self.names("")) - {_PROBE} and not self.exists(marker):
            raise StoreFormatError(
                f"{self.path} holds objects but is no activation store; choose an empty prefix"
            )
        self._require_conditional_put()
        if self.put_if_absent(marker, [content]):
            for name, data in objects.items():
                self.put_if_absent(name, [data])

    def _require_conditional_put(self) -> None:
        # A server that ignores the condition would let two attempts commit one item.
        name = f"{_PROBE}/{uuid.uuid4().hex}"
        self.put_if_absent(name, [b"first"])
        twice = self.put_if_absent(name, [b"second"])
        self.delete(name)
        if twice:
            raise StorageError(
                f"{self.path}: the server ignores If-None-Match, so that commits could overwrite "
                "each other; use a server that honours it, or a local folder"
            )

    def put(self, name: str, parts: Parts) -> None:
        data = self._join(name, parts)
        self._ask("put", name, lambda: obstore.put(self._store, name, data, use_multipart=False))

    def put_if_absent(self, name: str, parts: Parts) -> bool:
        data = self._join(name, parts)

        def create() -> bool:
            try:
                obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._ask("put", name, create) or self._holds(name, data)

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether an object has these bytes: then this call put it, and the answer was lost."""
        meta = self._head(name)
        if meta is None or meta["size"] != len(data):
            return False
        return not data or self.read_range(name, 0, len(data)).tobytes() == data

    def make_folder(self, name: str) -> None:
        pass

    def sync(self, folders: Sequence[str]) -> None:
        pass

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", name, lambda: obstore.delete(self._store, name))

    def is_stale(self, name: str) -> bool:
        meta = self._head(name)
        return meta is not None and _age_s(meta) > STALE_S

    def remove_stale(self) -> list[str]:
        return []  # objects appear whole

    @contextlib.contextmanager
    def lock(self, exclusive: bool, timeout_s: float | None = None) -> Iterator[None]:
        yield  # there is none to take; see `is_stale`

    def claim(self, run: str, who: str) -> Held:
        return Lease(self, run, who)

    def _head(self, name: str) -> Any | None:
        try:
            return self._ask("head", name, lambda: obstore.head(self._store, name))
        except FileNotFoundError:
            return None

    def _join(self, name: str, parts: Parts) -> bytes:
        data = b"".join(part if isinstance(part, bytes) else part.data for part in parts)
        if len(data) > _MOST_BYTES:
            raise StorageError(
                f"{self.where(name)} would have {len(data)} bytes: expected at most {_MOST_BYTES}, "
                "which is all that S3 takes at once; lower store.shard_tokens"
            )
        return data

    def _missing(self, name: str) -> MissingDataError:
        return MissingDataError(f"{self.where(name)} is missing; restore it from a backup")

    def _ask(self, what: str, name: str, request: Callable[[], T]) -> T:
        """The answer to a request that may be repeated.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: Refused, or no answer after `TRIES` tries.
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
                    break
        # Not from the error at hand: its text may hold an endpoint's password.
        raise StorageError(
            f"{self.where(name)}: {what} failed: {problem}; expected a bucket that can be reached "
            "and written: see AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )


def _connect(bucket: str, prefix: str) -> S3Store:
    """A client, from the environment; nothing is asked of the server yet."""
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
    raise StoreConfigError(
        "AWS_*", given, f"settings that belong together ({problem})", "set or unset the others"
    )


class _Object(ReadHandle):
    def __init__(self, storage: ObjectStorage, name: str, size: int) -> None:
        self._storage, self._name, self.size = storage, name, size

    def read_into(self, views: list[Bytes], offset: int) -> bool:
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
    """What went wrong, without any address."""
    text = str(error)
    status = re.search(r"status code: (\d+)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    parts = [f"HTTP {status[1]}" if status else "no answer, or one that was cut off"]
    return " ".join(parts + ([code[1]] if code else []))
