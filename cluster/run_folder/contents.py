"""Read the files of a run folder, whichever stages of the run have finished."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.run_folder.errors import RunFileError
from cluster.run_folder.files import CHECKPOINTS
from foundation.atomic_files import read_json
from sae_core.checkpoint.folder import MANIFEST, list_checkpoints


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file. Return None if the file has not been written yet.

    Raises:
        RunFileError: If the file exists but does not contain a JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFileError(
            f"{path}: expected JSON: {error}; rerun the stage that writes this file"
        ) from error
    if not isinstance(value, dict):
        raise RunFileError(
            f"{path}: expected a JSON object, found {type(value).__name__}; rerun the stage that "
            "writes this file"
        )
    return value


@dataclass(frozen=True)
class CheckpointEntry:
    """One finished checkpoint folder."""

    name: str
    written: datetime
    """Modification time of the folder, in UTC."""
    bytes: int
    """Total size of the files."""
    files: int
    """Number of files."""
    has_manifest: bool


def checkpoint_entries(run_dir: Path) -> list[CheckpointEntry]:
    """List the run's checkpoints, newest first, without verifying their contents."""
    entries = []
    for folder in list_checkpoints(run_dir / CHECKPOINTS):
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        written = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        manifest = (folder / MANIFEST).is_file()
        entries.append(CheckpointEntry(folder.name, written, sum(sizes), len(sizes), manifest))
    return entries
