"""Writing a checkpoint: all ranks write, all ranks vote, rank 0 makes it exist.

`step-N.tmp/` is filled and flushed, every rank says whether its part succeeded, then come the
manifest, the rename and `latest`. A death anywhere before the rename leaves the older checkpoints
as they were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
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
from sae_core.checkpoint.tensors import moment_tensors, weight_tensors
from sae_core.engine import SAEEngine
from sae_core.errors import CheckpointError
from sae_core.source import ActivationSource

T = TypeVar("T")


def save_checkpoint(
    root: Path, engines: list[SAEEngine], step: int, source: ActivationSource, seed: int, keep: int
) -> Path:
    """Writes `root/step-N` and prunes older ones; collective over all ranks.

    Args:
        root: the run's `checkpoints` folder, on a file system that all ranks share.
        engines: the SAEs.
        step: optimiser steps taken.
        source: whose position and identity are kept.
        seed: the run's seed.
        keep: newest valid checkpoints that stay.

    Raises:
        CheckpointError: some rank could not write; nothing then replaces the older ones.
    """
    final = root / checkpoint_name(step)
    temporary = root / f"{final.name}.tmp"
    is_first = dist.get_rank() == 0
    _together(lambda: _prepare(root, temporary) if is_first else None, "prepare", temporary)
    _together(lambda: _write(temporary, engines, step, source, seed), "write", temporary)
    entries = _together(lambda: _hash_share(temporary), "hash", temporary)
    files = {name: entry for part in entries for name, entry in part.items()}
    _together(
        lambda: _publish(temporary, final, step, files) if is_first else None, "finish", final
    )
    if is_first:
        for old in prunable(root, keep):
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def _together(action: Callable[[], T], what: str, folder: Path) -> list[T]:
    """Every rank's result of `action`, once all have succeeded; else an error on all of them.

    Only `action` may fail, and it calls no collective that the other ranks would miss.
    """
    outcome: tuple[T | None, str]
    try:
        outcome = (action(), "")
    except Exception as error:  # the vote reports it on every rank
        outcome = (None, f"{type(error).__name__}: {error}")
    votes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(votes, outcome)
    bad = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(votes) if problem]
    if bad:
        raise CheckpointError(
            f"cannot {what} {folder}: {'; '.join(bad)}; free space or fix the folder's rights, "
            "then run the same command again: older checkpoints are untouched"
        )
    return [result for result, _ in votes]


def _prepare(root: Path, temporary: Path) -> None:
    for killed in root.glob("step-*.tmp"):
        shutil.rmtree(killed)
    for part in (WEIGHTS, OPTIMIZER):
        (temporary / part).mkdir(parents=True)


def _write(
    temporary: Path, engines: list[SAEEngine], step: int, source: ActivationSource, seed: int
) -> None:
    # One SAE's moments at a time would need a collective save each; they are views under ZeRO 0.
    moments = {engine.name: engine.moments() for engine in engines}
    _save_tensors(temporary / WEIGHTS, weight_tensors(engines))
    _save_tensors(temporary / OPTIMIZER, moment_tensors(engines, moments))
    if dist.get_rank() == 0:
        first = engines[0]
        batch_tokens = first.config.train.batch_tokens
        state = CheckpointState(
            step=step,
            tokens=step * batch_tokens,
            source_position=source.position,
            source_identity=source.identity,
            seed=seed,
            batch_tokens=batch_tokens,
            d_model=first.sae.b_dec.shape[0],
            saes={engine.name: asdict(engine.sae.config) for engine in engines},
            mesh=asdict(first.config.parallel),
        )
        write_json(temporary / STATE, state.to_json())


def _save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)


def _hash_share(temporary: Path) -> dict[str, dict[str, object]]:
    """This rank's share of the manifest."""
    return {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        for name in payload_files(temporary)[dist.get_rank() :: dist.get_world_size()]
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
