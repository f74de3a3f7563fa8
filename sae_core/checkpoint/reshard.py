"""Copy a checkpoint, bit for bit, into a different number of files, a few MiB at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from foundation.atomic_files import fsync_path, write_json
from foundation.errors import ConfigError
from sae_core.checkpoint.folder import (
    MANIFEST,
    OPTIMIZER,
    SCHEMA,
    WEIGHTS,
    checkpoint_name,
    hash_file,
    payload_files,
    read_state,
)
from sae_core.checkpoint.row_ranges import StoredTensor, read_layout, sharding_metadata
from sae_core.checkpoint.safetensors_file import TensorFileWriter, rows_per_block
from sae_core.errors import CheckpointError


def reshard_checkpoint(source: Path, root: Path, n_shards: int) -> Path:
    """Copy a checkpoint to `root/step-N`, with weights and moments in `n_shards` files each.

    The source is not changed, and any mesh can resume from either checkpoint. If the process dies,
    it leaves `reshard-step-N.tmp`, which is not a checkpoint; the next attempt removes it.

    Args:
        source: A checkpoint whose manifest has been checked.
        root: Folder in which to create the copy: another run's `checkpoints`, or any other folder.
        n_shards: Number of files over which the rows of every tensor are divided.

    Returns:
        The folder of the copy.

    Raises:
        CheckpointError: If `root` already has a checkpoint of that step.
        ConfigError: If there are more shards than latents.
        DamagedCheckpointError: If the source is unreadable.
    """
    state = read_state(source)
    final = root / checkpoint_name(state.step)
    if final.exists():
        raise CheckpointError(f"{final} already exists; set reshard.to to another folder")
    layouts = {part: read_layout(source / part) for part in (WEIGHTS, OPTIMIZER)}
    n_latents = {name: int(sae["n_latents"]) for name, sae in state.saes.items()}
    fewest = min(n_latents.values(), default=0)
    if n_shards > fewest:
        raise ConfigError("reshard.shards", n_shards, f"at most {fewest}, the number of latents")
    # Do not name it step-N.tmp: a run that saves into the same folder deletes such folders.
    temporary = root / f"reshard-{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for part, tensors in layouts.items():
        (temporary / part).mkdir(parents=True)
        sharded = _sharded_names(tensors, n_latents)
        for shard in range(n_shards):
            file = temporary / part / f"shard-{shard + 1:05d}-model-00001-of-00001.safetensors"
            _write_shard(file, tensors, _row_ranges(tensors, sharded, shard, n_shards))
    for name in payload_files(source):
        if name.endswith(".json"):
            shutil.copyfile(source / name, temporary / name)
    _finish(temporary, final, state.step)
    return final


def _sharded_names(
    tensors: Mapping[str, StoredTensor], n_latents: Mapping[str, int]
) -> frozenset[str]:
    """Return the names of the tensors that have one row per latent of their SAE."""
    return frozenset(
        name
        for name, tensor in tensors.items()
        for sae, rows in n_latents.items()
        if name.startswith(f"{sae}.") and tensor.shape[:1] == (rows,)
    )


def _row_ranges(
    tensors: Mapping[str, StoredTensor], sharded: frozenset[str], shard: int, n_shards: int
) -> dict[str, tuple[int, int]]:
    """Return the rows [start, stop) of each tensor that belong in one file.

    Tensors without a row per latent are stored whole, in the first file.
    """
    ranges = {}
    for name, tensor in tensors.items():
        rows = tensor.pieces[-1].stop_row
        if name in sharded:
            ranges[name] = (shard * rows // n_shards, (shard + 1) * rows // n_shards)
        elif shard == 0:
            ranges[name] = (0, rows)
    return ranges


def _write_shard(
    path: Path, tensors: Mapping[str, StoredTensor], ranges: Mapping[str, tuple[int, int]]
) -> None:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    starts: dict[str, tuple[int, int]] = {}
    for name, (start, stop) in ranges.items():
        shape = tensors[name].shape
        shapes[name] = (tensors[name].dtype, (stop - start, *shape[1:]) if shape else ())
        starts[name] = (start, len(shape))
    with TensorFileWriter(path, shapes, sharding_metadata(starts)) as file:
        for name, (start, stop) in ranges.items():
            step = rows_per_block(file.entries[name].row_bytes)
            for first in range(start, stop, step):
                rows = tensors[name].rows(first, min(first + step, stop))
                file.write_rows(name, first - start, rows)


def _finish(temporary: Path, final: Path, step: int) -> None:
    """Write the manifest, flush everything to disk, and rename the folder to its final name."""
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        for name in payload_files(temporary)
    }
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})
    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    os.rename(temporary, final)
    fsync_path(final.parent)
