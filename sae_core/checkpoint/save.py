"""Writing a checkpoint: all ranks write, all ranks vote, rank 0 makes it exist.

`step-N.tmp/` is filled and flushed, every rank says whether its part succeeded, then come the
manifest, the rename and `latest`. A death anywhere before the rename leaves the older checkpoints
as they were.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

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


def save_checkpoint(
    root: Path, engines: list[SAEEngine], step: int, source_position: int, seed: int, keep: int
) -> Path:
    """Writes `root/step-N` and prunes older ones; collective over all ranks.

    Args:
        root: the run's `checkpoints` folder, on a file system that all ranks share.
        engines: the SAEs.
        step: optimiser steps taken.
        source_position: the source's next batch.
        seed: the run's seed.
        keep: newest valid checkpoints that stay.

    Raises:
        CheckpointError: some rank could not write; nothing then replaces the older ones.
    """
    final = root / checkpoint_name(step)
    temporary = root / f"{final.name}.tmp"
    _together(lambda: _prepare(temporary), "prepare", temporary, only_rank_0=True)
    _together(lambda: _write(temporary, engines, step, source_position, seed), "write", temporary)
    _together(lambda: _finish(temporary, final, step), "finish", temporary)
    if dist.get_rank() == 0:
        for old in prunable(root, keep):
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def _together(action: object, what: str, folder: Path, only_rank_0: bool = False) -> None:
    """Runs `action` on the ranks, then all learn whether it succeeded everywhere."""
    problem = ""
    if not only_rank_0 or dist.get_rank() == 0:
        try:
            action()  # type: ignore[operator]
        except Exception as error:  # the vote below reports it on every rank
            problem = f"{type(error).__name__}: {error}"
    votes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(votes, problem)
    bad = [f"rank {rank}: {vote}" for rank, vote in enumerate(votes) if vote]
    if bad:
        raise CheckpointError(
            f"cannot {what} {folder}: {'; '.join(bad)}; free space or fix the folder's rights, "
            "then run the same command again: older checkpoints are untouched"
        )


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    for part in (WEIGHTS, OPTIMIZER):
        (temporary / part).mkdir(parents=True)


def _write(
    temporary: Path, engines: list[SAEEngine], step: int, source_position: int, seed: int
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
            source_position=source_position,
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


def _finish(temporary: Path, final: Path, step: int) -> None:
    """Manifest, rename, `latest`; every rank hashes its share of the files."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    files = payload_files(temporary)
    mine = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        for name in files[rank::n_ranks]
    }
    gathered: list[dict[str, dict[str, object]] | None] = [None] * n_ranks
    dist.all_gather_object(gathered, mine)
    if rank:
        return
    entries = {name: entry for part in gathered if part for name, entry in part.items()}
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": entries})
    for folder in (temporary / WEIGHTS, temporary / OPTIMIZER, temporary):
        fsync_path(folder)
    if final.exists():  # a damaged one of the same step, passed over when the run resumed
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    write_json(final.parent / LATEST, final.name)
