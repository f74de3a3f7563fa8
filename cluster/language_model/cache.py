"""A cache on disk: folders that are built once under a lock, and hashes of files."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from uuid import uuid4

from foundation.atomic_files import fsync_path, naming, write_json


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build(temporary_folder)` first if it does not exist yet.

    If several processes call this at once, one builds and the others wait for it. The finished
    temporary folder is renamed to `folder`, so a folder that exists is complete. Temporary folders
    of killed builders are removed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():  # another process built it while this process waited
            return folder
        for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
            shutil.rmtree(leftover)
        temporary = folder.with_name(f"{folder.name}.{uuid4().hex}.tmp")
        temporary.mkdir()
        try:
            with naming(temporary):
                build(temporary)
            for file in temporary.rglob("*"):
                fsync_path(file)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(folder.parent)
    return folder


def file_sha256(path: Path, cache_dir: Path) -> str:
    """Return the SHA-256 of a file, cached in `cache_dir` until its size or mtime changes."""
    real = path.resolve()
    stat = real.stat()
    identity = f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    memory = cache_dir / "hashes" / f"{digest(identity)}.json"
    if memory.is_file():
        return str(json.loads(memory.read_text())["sha256"])
    with real.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json(memory, {"file": real.name, "sha256": sha256})
    return sha256


def digest(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, for use as a cache key."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Use flock rather than an exclusively created file, because the kernel releases a flock if its
    # holder dies.
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def find_package(name: str) -> ModuleSpec | None:
    """Find an installed package without importing it. Return None if it is not installed."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # raised if the parent of a dotted name is missing
        return None
