"""Create checkpoints without training: the files of two ranks, filled with random values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from sae_core.checkpoint.folder import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    CheckpointState,
    checkpoint_name,
    hash_file,
    payload_files,
)
from sae_core.checkpoint.row_ranges import SAVED_OFFSETS, SHARDING
from sae_core.checkpoint.safetensors_file import TensorFileWriter, rows_per_block
from sae_core.config import TopKConfig

NAME = "model.layers.9"
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def make_checkpoint(
    root: Path, n_latents: int, d_model: int, step: int = 7, empty: bool = False
) -> Path:
    """Write a checkpoint of one SAE in blocks that fit in memory.

    Args:
        root: Folder of the checkpoint.
        n_latents: Number of latents L.
        d_model: Width D.
        step: Training step of the checkpoint.
        empty: Write zeros instead of random values, which is faster.

    Returns:
        The checkpoint's folder, `root/step-N`.
    """
    folder = root / checkpoint_name(step)
    matrix, column = (n_latents, d_model), (n_latents,)
    weights: Shapes = {
        "W_enc": (torch.float32, matrix),
        "W_dec": (torch.float32, matrix),
        "b_enc": (torch.float32, column),
        "b_dec": (torch.float32, (d_model,)),
        "input_mean": (torch.float32, (d_model,)),
        "input_scale": (torch.float32, ()),
        "tokens_since_fired": (torch.int64, column),
    }
    moments: Shapes = {
        f"{name}.{moment}": weights[name]
        for name in ("W_enc", "W_dec", "b_enc", "b_dec")
        for moment in ("exp_avg", "exp_avg_sq")
    }
    for part, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
        (folder / part).mkdir(parents=True)
        for rank in range(2):
            _write_rank(folder / part, tensors, n_latents, rank, empty)
    state = CheckpointState(
        step=step,
        tokens=step * 8,
        source_position=step,
        source_identity="synthetic",
        seed=0,
        batch_tokens=8,
        d_model=d_model,
        saes={NAME: asdict(TopKConfig(n_latents=n_latents, k=4, hookpoint=NAME))},
        mesh={"latent": 2, "data": 1, "zero_stage": 0},
    )
    (folder / STATE).write_text(json.dumps(state.to_json()))
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    """Write a manifest that matches the current files of the folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
        for name in payload_files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "files": files}))


def _write_rank(folder: Path, tensors: Shapes, n_latents: int, rank: int, empty: bool) -> None:
    """Write one rank's file: its half of the latents and, on rank 0, the unsharded tensors."""
    half = -(-n_latents // 2)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, (dtype, shape) in tensors.items():
        sharded = shape[:1] == (n_latents,)
        if not sharded and rank:
            continue
        first, stop = ((0, half), (half, n_latents))[rank] if sharded else (0, 0)
        shapes[f"{NAME}.{name}"] = dtype, ((stop - first, *shape[1:]) if sharded else shape)
        offsets[f"{NAME}.{name}"] = {SAVED_OFFSETS: [first, *[0] * (len(shape) - 1)][: len(shape)]}
    generator = torch.Generator().manual_seed(rank)
    path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    with TensorFileWriter(path, shapes, {SHARDING: json.dumps(offsets)}) as file:
        for name, entry in file.entries.items():
            if name.endswith("input_scale"):
                file.write_rows(name, 0, torch.tensor(0.5))
                continue
            rows = 0 if empty else entry.shape[0]
            step = rows_per_block(entry.row_bytes)
            for first in range(0, rows, step):
                shape = (min(step, rows - first), *entry.shape[1:])
                file.write_rows(name, first, torch.rand(shape, generator=generator))
