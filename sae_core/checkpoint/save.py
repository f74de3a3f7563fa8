"""Writing a checkpoint: all ranks write, all ranks vote, rank 0 makes it exist.

`step-N.tmp/` is filled and flushed, every rank says whether its part succeeded, then come the
manifest, the rename and `latest`. A death anywhere before the rename leaves the older checkpoints
as they were.

torch's own `async_save` covers the writing alone, in a pool of threads that a process waits for
at its end: hashes, votes, rename and pruning would need a second thread behind each of its
futures. So one thread of ours (`saver.py`) does all of it, through the same writer.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sae_core.atomic import fsync_path, write_json
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
from sae_core.checkpoint.staging import HostTensors
from sae_core.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there."""

    keep: int
    """Newest valid ones."""
    keep_every_steps: int | None = None
    """Also the first one of every stretch of so many steps, for good; None: no such."""


def write_checkpoint(
    root: Path,
    tensors: HostTensors,
    state: CheckpointState,
    retention: Retention,
    group: dist.ProcessGroup,
) -> Path:
    """Writes `root/step-N` and prunes older ones; collective over all ranks.

    Args:
        root: the run's `checkpoints` folder, on a file system that all ranks share.
        tensors: this rank's part, on the host.
        state: the scalars, the same on all ranks.
        retention: which older ones stay.
        group: all ranks, over gloo; nobody else may use it meanwhile.

    Raises:
        CheckpointError: some rank could not write; nothing then replaces the older ones.
    """
    final = root / checkpoint_name(state.step)
    temporary = root / f"{final.name}.tmp"
    is_first = dist.get_rank() == 0
    together = _Together(group)
    together(lambda: _prepare(root, temporary) if is_first else None, "prepare", temporary)
    together(lambda: _write(temporary, tensors, state, group), "write", temporary)
    # On a network file system one rank's listing may lack what another has just written.
    seen = together(lambda: payload_files(temporary), "list", temporary)
    names = sorted(set().union(*seen))
    entries = together(lambda: _hash_share(temporary, names), "hash", temporary)
    files = {name: entry for part in entries for name, entry in part.items()}
    together(
        lambda: _publish(temporary, final, state.step, files) if is_first else None,
        "finish",
        final,
    )
    if is_first:
        for old in list(prunable(root, retention.keep, retention.keep_every_steps)):
            _remove(old)
    return final


class _Together:
    """Votes of all ranks over one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, action: Callable[[], T], what: str, folder: Path) -> list[T]:
        """Every rank's result of `action`, once all have succeeded; else an error on all of them.

        Only `action` may fail, and it calls no collective that the other ranks would miss.
        """
        outcome: tuple[T | None, str]
        try:
            outcome = (action(), "")
        except Exception as error:  # the vote reports it on every rank
            outcome = (None, f"{type(error).__name__}: {error}")
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, outcome, group=self._group)
        bad = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(votes) if problem]
        if bad:
            raise CheckpointError(
                f"cannot {what} {folder}: {'; '.join(bad)}; free space or fix the folder's "
                "rights, then run the same command again: older checkpoints are untouched"
            )
        return [result for result, _ in votes]


def _prepare(root: Path, temporary: Path) -> None:
    for killed in root.glob("step-*.tmp"):
        shutil.rmtree(killed)
    for part in (WEIGHTS, OPTIMIZER):
        (temporary / part).mkdir(parents=True)


def _write(
    temporary: Path, tensors: HostTensors, state: CheckpointState, group: dist.ProcessGroup
) -> None:
    rank = dist.get_rank()
    for part, content in ((WEIGHTS, tensors.weights), (OPTIMIZER, tensors.optimizer)):
        failures = _save_tensors(temporary / part, content, group)
        if rank in failures:
            raise failures[rank]
        if failures:
            return  # the vote names the ranks, and none of them writes the next part
    if rank == 0:
        write_json(temporary / STATE, state.to_json())


def _save_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup
) -> dict[int, BaseException]:
    """What ranks failed with; the same on all ranks."""
    # The writer builds each file in memory first: a matrix to a file bounds what that takes.
    matrices = sorted(name for name, tensor in tensors.items() if tensor.dim() == 2)
    files = {name: 1 for name in tensors} | {name: 2 + i for i, name in enumerate(matrices)}
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:  # no Exception: it would pass the vote by
        return {rank: failure for rank, (failure, _) in error.failures.items()}
    return {}


def _hash_share(temporary: Path, names: list[str]) -> dict[str, dict[str, object]]:
    """This rank's share of the manifest of all `names`."""
    return {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        for name in names[dist.get_rank() :: dist.get_world_size()]
    }


def _publish(temporary: Path, final: Path, step: int, files: dict[str, dict[str, object]]) -> None:
    """Manifest, rename, `latest`."""
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})
    for folder in (temporary / WEIGHTS, temporary / OPTIMIZER, temporary):
        fsync_path(folder)
    if final.exists():  # a damaged one of the same step, passed over when the run resumed
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    write_json(final.parent / LATEST, final.name)


def _remove(old: Path) -> None:
    """Deletes a checkpoint at once: one that is killed halfway is none, not a damaged one."""
    doomed = old.with_name(f"{old.name}.old.tmp")
    try:
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"cannot delete {old}: {error}", stacklevel=2)
