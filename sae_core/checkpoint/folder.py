"""The checkpoint folder on disk: names, state, manifest, and which one is the newest valid.

    checkpoints/step-00000150/weights/*.safetensors     parameters and buffers, [L, D] row ranges
                              optimizer/*.safetensors   Adam's moments, the same row ranges
                              state.json                step, tokens, source position, config
                              manifest.json             size and SHA-256 of all of the above
    checkpoints/latest                                  name of the newest one, for people

A folder is a checkpoint only under its final name and with a manifest; `step-*.tmp` is none.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_core.atomic import read_json
from sae_core.errors import DamagedCheckpointError

SCHEMA = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_NAME = re.compile(r"step-(\d{8,12})")
_HASH_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class CheckpointState:
    """The scalars of a checkpoint."""

    step: int
    """Optimiser steps taken."""
    tokens: int
    """Training tokens seen."""
    source_position: int
    """The source's next batch."""
    source_identity: str
    """Of the rows that positions count."""
    seed: int
    batch_tokens: int
    d_model: int
    saes: dict[str, dict[str, Any]]
    """`{name: SAEConfig as a dict}`"""
    mesh: dict[str, int]
    """Layout that wrote it; for information, any other may load it."""
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, newest first; valid or not."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(folder.name.split("-")[1])


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def payload_files(folder: Path) -> list[str]:
    """What the manifest covers, relative and sorted."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def check_manifest(folder: Path, hashes: bool = True) -> None:
    """Compares a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        hashes: also compare SHA-256, not only names and sizes.

    Raises:
        DamagedCheckpointError: naming the file and what differs.
    """
    expected = _read(folder, MANIFEST).get("files")
    if not isinstance(expected, dict) or not all(isinstance(e, dict) for e in expected.values()):
        raise DamagedCheckpointError(f"{folder / MANIFEST}: expected a table of files")
    found = set(payload_files(folder))
    if found != set(expected):
        odd = ", ".join(sorted(found ^ set(expected)))
        raise DamagedCheckpointError(f"{folder}: missing or unlisted files: {odd}")
    for name, entry in expected.items():
        size = (folder / name).stat().st_size
        if size != entry.get("bytes"):
            raise DamagedCheckpointError(
                f"{folder / name}: {size} bytes, the manifest says {entry.get('bytes')}"
            )
        if hashes and hash_file(folder / name) != entry.get("sha256"):
            raise DamagedCheckpointError(f"{folder / name}: SHA-256 differs from the manifest")


def read_state(folder: Path) -> CheckpointState:
    """The checkpoint's scalars.

    Raises:
        DamagedCheckpointError: unreadable, or not of this schema.
    """
    raw = _read(folder, STATE)
    if raw.get("schema") != SCHEMA:
        raise DamagedCheckpointError(
            f"{folder / STATE}: schema {raw.get('schema')!r}, this version reads {SCHEMA}"
        )
    try:
        return CheckpointState(**raw)
    except TypeError as error:
        raise DamagedCheckpointError(f"{folder / STATE}: {error}") from error


def newest_valid(root: Path, hashes: bool = True) -> Path | None:
    """The newest checkpoint that passes its manifest; warns of damaged ones that it skips."""
    for folder in list_checkpoints(root):
        try:
            check_manifest(folder, hashes)
            read_state(folder)
        except DamagedCheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
            continue
        return folder
    return None


def prunable(root: Path, keep: int, keep_every_steps: int | None = None) -> Iterable[Path]:
    """Checkpoints beyond the `keep` newest that pass a size check, but for milestones.

    Args:
        root: the run's `checkpoints` folder; what is not published there is neither counted nor
            given.
        keep: how many of the newest stay.
        keep_every_steps: the first checkpoint of every stretch of so many steps stays, too, from
            the second stretch on.
    """
    finished = list_checkpoints(root)
    milestones = _milestones(finished, keep_every_steps)
    kept = 0
    for folder in finished:
        if kept >= keep:
            if folder not in milestones:
                yield folder
            continue
        if _looks_whole(folder):
            kept += 1  # one that does not is left for a person to look at, and not counted


def _milestones(finished: list[Path], every_steps: int | None) -> set[Path]:
    if every_steps is None:
        return set()
    first: dict[int, Path] = {}
    for folder in reversed(finished):
        stretch = step_of(folder) // every_steps
        if stretch and stretch not in first and _looks_whole(folder):
            first[stretch] = folder
    return set(first.values())


def _looks_whole(folder: Path) -> bool:
    try:
        check_manifest(folder, hashes=False)
    except DamagedCheckpointError:
        return False
    return True


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = read_json(folder / name)
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder / name}: {error}") from error
    if not isinstance(value, dict):
        raise DamagedCheckpointError(f"{folder / name}: expected a JSON object")
    return value
