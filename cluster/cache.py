"""Things that are made once and kept: folders built under a lock, and file hashes."""

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

from sae_core.atomic import fsync_path, write_json


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, which `build(temporary folder)` fills if it does not exist yet.

    Several processes may ask at once: one builds, the others wait for it. The folder appears by a
    rename, so one that exists is whole; what a killed builder left behind is removed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
            shutil.rmtree(leftover)
        temporary = folder.with_name(f"{folder.name}.{uuid4().hex}.tmp")
        temporary.mkdir()
        try:
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
    """SHA-256 of a whole file, remembered in `cache_dir` until its size or time stamp changes."""
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
    """SHA-256 of a value's canonical JSON: the key under which something is cached."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # flock, not an exclusively created file: the kernel releases it when its holder is killed.
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def find_package(name: str) -> ModuleSpec | None:
    """Where an installed package lies, without running any of it; None when it is not installed."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a parent in a dotted name
        return None
