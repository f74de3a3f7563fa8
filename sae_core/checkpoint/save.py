"""Write a checkpoint: all ranks write, all ranks vote, rank 0 publishes it.

The ranks fill and flush `step-N.tmp/`. After each stage every rank reports whether its part
succeeded. Rank 0 then writes the manifest, renames the folder and updates `latest`. If a process
dies before the rename, the older checkpoints are untouched.

A single thread (`background_saver.py`) writes, hashes, votes, renames and prunes. torch's storage
writer is not used: it assembles each file in memory, which takes the size of the largest matrix
twice, and asks for the CUDA stream of its thread, which creates a second context on device 0 in all
ranks that use another device. The files have the format of torch's distributed checkpoint.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from foundation.atomic_files import fsync_path, write_json
from sae_core.checkpoint.folder import (
    LATEST,
    MANIFEST,
    OPTIMIZER,
    SCHEMA,
    STATE,
    WEIGHTS,
    CheckpointState,
    checkpoint_name,
    hash_file,
    payload_files,
    prunable,
)
from sae_core.checkpoint.host_copy import Staging
from sae_core.checkpoint.own_tensors import OwnTensor
from sae_core.checkpoint.row_ranges import sharding_metadata
from sae_core.checkpoint.safetensors_file import TensorFileWriter
from sae_core.distributed.ranks import is_rank_zero, on_all_ranks
from sae_core.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Rule that decides which older checkpoints to keep after a save."""

    keep: int
    """Number of newest valid checkpoints to keep."""
    keep_every_steps: int | None = None
    """Also keep the first checkpoint of every N steps permanently; None keeps no others."""


def write_checkpoint(
    root: Path,
    own: list[OwnTensor],
    staging: Staging,
    state: CheckpointState,
    retention: Retention,
    group: dist.ProcessGroup,
) -> Path:
    """Write `root/step-N` and delete older checkpoints; collective over all ranks.

    Args:
        root: The run's `checkpoints` folder, on a file system that all ranks share.
        own: The tensors that this rank writes.
        staging: Their bytes. All blocks are returned, even if the save fails.
        state: The scalars, the same on all ranks.
        retention: Which older checkpoints to keep.
        group: A gloo group of all ranks that nothing else uses during the save.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: If any rank failed; raised on all ranks. Older checkpoints are untouched.
    """
    try:
        return _write_checkpoint(root, own, staging, state, retention, group)
    finally:
        staging.discard()


def _write_checkpoint(
    root: Path,
    own: list[OwnTensor],
    staging: Staging,
    state: CheckpointState,
    retention: Retention,
    group: dist.ProcessGroup,
) -> Path:
    final = root / checkpoint_name(state.step)
    temporary = root / f"{final.name}.tmp"

    def together(verb: str, folder: Path, action: Callable[[], T]) -> T:
        return on_all_ranks(lambda: _as_checkpoint_error(verb, folder, action), group)

    together("prepare", temporary, lambda: _prepare(root, temporary) if is_rank_zero() else None)
    together("write", temporary, lambda: _write(temporary, own, staging, state))
    # On a network file system, one rank may not yet see files that another has just written.
    seen = together("list", temporary, lambda: payload_files(temporary))
    names = sorted(set().union(*_gather(seen, group)))
    hashed = together("hash", temporary, lambda: _hash_share(temporary, names))
    files = {name: entry for part in _gather(hashed, group) for name, entry in part.items()}
    together(
        "finish",
        final,
        lambda: _publish(temporary, final, state.step, files) if is_rank_zero() else None,
    )
    if is_rank_zero():
        for old in list(prunable(root, retention.keep, retention.keep_every_steps)):
            _remove(old)
    return final


def _as_checkpoint_error(verb: str, folder: Path, action: Callable[[], T]) -> T:
    """Return the result of `action()`; any error becomes a CheckpointError.

    Args:
        verb: Stage of the save, for the error message.
        folder: Folder, for the error message.
        action: This rank's part of the stage.
    """
    try:
        return action()
    except Exception as error:
        raise CheckpointError(
            f"cannot {verb} {folder}: rank {dist.get_rank()}: {type(error).__name__}: {error}; "
            "free disk space or fix the folder's permissions, then run the same command again; "
            "older checkpoints are untouched"
        ) from error


def _gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the values of all ranks, in the order of ranks; collective."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return cast(list[T], values)


def _prepare(root: Path, temporary: Path) -> None:
    for killed in root.glob("step-*.tmp"):
        shutil.rmtree(killed)
    for part in (WEIGHTS, OPTIMIZER):
        (temporary / part).mkdir(parents=True)


def _write(temporary: Path, own: list[OwnTensor], staging: Staging, state: CheckpointState) -> None:
    _write_tensors(temporary, own, staging)
    if is_rank_zero():
        write_json(temporary / STATE, state.to_json())


def _write_tensors(temporary: Path, own: list[OwnTensor], staging: Staging) -> None:
    """Write this rank's files as their bytes arrive, and flush them to disk."""
    with ExitStack() as stack:
        files: dict[str, TensorFileWriter] = {}
        for path, tensors in _files(own).items():
            shapes = {tensor.key: (tensor.dtype, tensor.shape) for tensor in tensors}
            starts = {tensor.key: (tensor.first_row, len(tensor.shape)) for tensor in tensors}
            writer = TensorFileWriter(temporary / path, shapes, sharding_metadata(starts))
            files |= dict.fromkeys(shapes, stack.enter_context(writer))
        while (block := staging.next()) is not None:
            with block as pieces:
                for piece in pieces:
                    files[piece.key].write_bytes(piece.key, piece.first_byte, piece.data)


def _files(own: list[OwnTensor]) -> dict[str, list[OwnTensor]]:
    """Divide this rank's tensors into files: each matrix has its own, all others share one."""
    files: dict[str, list[OwnTensor]] = {}
    for folder in (WEIGHTS, OPTIMIZER):
        here = [tensor for tensor in own if tensor.folder == folder]
        groups = [[tensor for tensor in here if len(tensor.shape) != 2]]
        groups += [[tensor] for tensor in here if len(tensor.shape) == 2]
        for number, tensors in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if tensors:
                files[f"{folder}/shard-{dist.get_rank() + 1:05d}-{name}"] = tensors
    return files


def _hash_share(temporary: Path, names: list[str]) -> dict[str, dict[str, object]]:
    """Return the manifest entries of this rank's share of `names`."""
    return {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        for name in names[dist.get_rank() :: dist.get_world_size()]
    }


def _publish(temporary: Path, final: Path, step: int, files: dict[str, dict[str, object]]) -> None:
    """Write the manifest, flush the folders, rename the checkpoint and update `latest`."""
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})
    for folder in (temporary / WEIGHTS, temporary / OPTIMIZER, temporary):
        fsync_path(folder)
    if final.exists():  # a damaged checkpoint of the same step, skipped when the run resumed
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    write_json(final.parent / LATEST, final.name)


def _remove(old: Path) -> None:
    """Delete a checkpoint.

    The folder is renamed first. If the process dies during the deletion, the remains then do not
    count as a damaged checkpoint.
    """
    doomed = old.with_name(f"{old.name}.old.tmp")
    try:
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"cannot delete {old}: {error}", stacklevel=2)
