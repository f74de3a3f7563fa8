"""The checkpoint folder on disk: names, state, manifest, and the choice of the newest valid one.

    checkpoints/step-00000150/weights/*.safetensors     parameters and buffers, [L, D] row ranges
                              optimizer/*.safetensors   Adam's moments, the same row ranges
                              state.json                step, tokens, source position, config
                              manifest.json             size and SHA-256 of all of the above
    checkpoints/latest                                  name of the newest (for people to read)

A folder is a checkpoint only if it has its final name and a manifest. `step-*.tmp` is an unfinished
save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foundation.atomic_files import read_json
from foundation.errors import ConfigError
from foundation.typed_json import from_json
from sae_core.architectures.registry import settings_from_json
from sae_core.errors import DamagedCheckpointError
from sae_core.kernels.prefilter_choice import PrefilterChoice

SCHEMA = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_NAME = re.compile(r"step-(\d{8,12})")
_PAYLOAD = re.compile(r"(?:\w[\w\-]*/)?\w[\w.\-]*\.(?:safetensors|json)")
"""Relative paths allowed in a checkpoint: no pickles, and no path that leaves the folder."""
_HASH_CHUNK_BYTES = 8 << 20
_HASH_THREADS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class CheckpointState:
    """The scalars of a checkpoint, stored in `state.json`."""

    step: int
    """Optimiser steps taken."""
    tokens: int
    """Training tokens seen."""
    source_position: int
    """Index of the source's next batch."""
    source_identity: str
    """`ActivationSource.identity` of the source that the position refers to."""
    seed: int
    """The run's seed."""
    batch_tokens: int
    """Tokens in a global batch."""
    d_model: int
    """Width of the activations."""
    saes: dict[str, dict[str, Any]]
    """`{name: settings of the SAE as a dict}`"""
    mesh: dict[str, int]
    """Mesh that wrote the checkpoint. For information only: any mesh can load it."""
    prefilter: dict[str, Any] = field(default_factory=dict)
    """The fields of the `PrefilterChoice` that training used; empty unless `train.prefilter=auto`
    had a choice."""
    schema: int = SCHEMA
    """Version of the checkpoint format."""

    @property
    def prefilter_choice(self) -> PrefilterChoice | None:
        """The choice of `train.prefilter=auto`, or None if there was nothing to choose.

        Raises:
            ValueError: If `prefilter` does not have the fields of a `PrefilterChoice`.
        """
        return from_json(PrefilterChoice, self.prefilter) if self.prefilter else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return asdict(self)


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the published checkpoint folders, newest first, without checking their files."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step from the name of a checkpoint folder."""
    return int(folder.name.split("-")[1])


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def payload_files(folder: Path) -> list[str]:
    """List the files that a manifest covers, as sorted relative paths.

    Links are listed too, so that checking the checkpoint rejects them.
    """
    files = (
        path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != folder / MANIFEST
    )
    return sorted(path.relative_to(folder).as_posix() for path in files)


def find_damage(folder: Path, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """List every difference between a checkpoint and its manifest.

    Args:
        folder: The checkpoint.
        hashes: Compare SHA-256 as well as names and sizes; several files are hashed in parallel.
        share: (i, n): compare only the hashes of every n-th file, beginning with file i, so that
            ranks can divide the work. Names and sizes are always compared.

    Returns:
        One line per difference; empty if there is none.
    """
    try:
        expected = _read(folder, MANIFEST).get("files")
        found = set(payload_files(folder))
    except (DamagedCheckpointError, OSError) as error:
        return [str(error)]
    if not isinstance(expected, dict) or not all(isinstance(e, dict) for e in expected.values()):
        return [f'{folder / MANIFEST}: expected "files" to be an object of objects']
    problems = [f"{folder / name}: missing" for name in sorted(set(expected) - found)]
    problems += [f"{folder / name}: not in the manifest" for name in sorted(found - set(expected))]
    both = sorted(found & set(expected))
    first, step = share
    hashed = set(both[first::step] if hashes else [])

    def check(name: str) -> str | None:
        return _file_damage(folder / name, name, expected[name], name in hashed)

    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashlib and read() release the GIL
        problems += [problem for problem in pool.map(check, both) if problem]
    return problems


def check_manifest(folder: Path, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check a checkpoint against its manifest; takes the same arguments as `find_damage`.

    Raises:
        DamagedCheckpointError: If anything differs. The message names each file and the difference.
    """
    problems = find_damage(folder, hashes, share)
    if problems:
        raise DamagedCheckpointError("; ".join(problems))


def _file_damage(path: Path, name: str, entry: dict[str, Any], hashed: bool) -> str | None:
    if not _PAYLOAD.fullmatch(name):
        return f"{path}: unexpected file in a checkpoint; remove it"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return f"{path}: a link or special file; expected a regular file"
        size = path.stat().st_size
        if size != entry.get("bytes"):
            return f"{path}: {size} bytes, the manifest says {entry.get('bytes')!r:.40}"
        if hashed and hash_file(path) != entry.get("sha256"):
            return f"{path}: SHA-256 differs from the manifest"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def read_state(folder: Path) -> CheckpointState:
    """Read and check the scalars of a checkpoint.

    Raises:
        DamagedCheckpointError: If `state.json` is unreadable, has another schema, or holds invalid
            values.
        ConfigError: If the architecture of an SAE is not registered.
    """
    raw = _read(folder, STATE)
    if raw.get("schema") != SCHEMA:
        raise DamagedCheckpointError(
            f"{folder / STATE}: schema {raw.get('schema')!r:.40}, expected {SCHEMA}; the "
            "checkpoint is damaged, or was written by another version of latent-foundry"
        )
    try:
        state = from_json(CheckpointState, raw)
        for sae in state.saes.values():
            settings_from_json(sae)
        _ = state.prefilter_choice
    except ConfigError:
        raise  # an architecture that is not installed here; the checkpoint may be valid
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder / STATE}: {error}") from error
    counts = (state.step, state.tokens, state.source_position, state.batch_tokens, state.d_model)
    if min(counts) < 0:
        raise DamagedCheckpointError(
            f"{folder / STATE}: expected step, tokens, source_position, batch_tokens and d_model "
            "of 0 or more"
        )
    return state


def weights_digest(folder: Path) -> str | None:
    """Return a hash of the manifest's hashes of all weight files; None if one is missing.

    Raises:
        DamagedCheckpointError: If the manifest is unreadable.
    """
    files = _read(folder, MANIFEST).get("files")
    if not isinstance(files, dict):
        return None
    hashes = {
        name: entry.get("sha256") if isinstance(entry, dict) else None
        for name, entry in files.items()
        if name.startswith(f"{WEIGHTS}/")
    }
    if not hashes or not all(isinstance(value, str) for value in hashes.values()):
        return None
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def newest_valid(root: Path, hashes: bool = True) -> Path | None:
    """Return the newest checkpoint that matches its manifest, or None; warn about skipped ones."""
    for folder in list_checkpoints(root):
        try:
            check_manifest(folder, hashes)
            read_state(folder)
        except DamagedCheckpointError as error:
            warn_skipped(error)
            continue
        return folder
    return None


def warn_skipped(error: object) -> None:
    """Warn that a damaged or unreadable checkpoint is skipped, and why."""
    warnings.warn(f"skipping a damaged or unreadable checkpoint: {error}", stacklevel=3)


def prunable(root: Path, keep: int, keep_every_steps: int | None = None) -> Iterable[Path]:
    """Yield the checkpoints that may be deleted.

    The milestones and the `keep` newest checkpoints that pass a size check are kept. Newer
    checkpoints that fail the check are also kept, for a person to inspect. Unfinished saves are
    ignored.

    Args:
        root: The run's `checkpoints` folder.
        keep: Number of newest checkpoints to keep.
        keep_every_steps: Keep the first checkpoint of every N steps, except for the first N steps,
            as a milestone. None means no milestones.
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
            kept += 1  # a damaged one is kept for a person to inspect, but not counted


def _milestones(finished: list[Path], every_steps: int | None) -> set[Path]:
    if every_steps is None:
        return set()
    first: dict[int, Path] = {}
    for folder in reversed(finished):
        period = step_of(folder) // every_steps
        if period and period not in first and _looks_whole(folder):
            first[period] = folder
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
