"""Load a checkpoint on any mesh: each rank reads only its own rows."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sae_core.checkpoint.dtensors import local_part, moment_tensors, weight_tensors
from sae_core.checkpoint.folder import (
    OPTIMIZER,
    WEIGHTS,
    CheckpointState,
    check_manifest,
    list_checkpoints,
    read_state,
    warn_skipped,
)
from sae_core.checkpoint.row_ranges import read_layout
from sae_core.distributed.ranks import is_rank_zero, on_all_ranks
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.errors import CheckpointError

_SIZES = ("architecture", "n_latents", "hookpoint")


def agreed_checkpoint(root: Path, hashes: bool = True) -> Path | None:
    """Agree on the newest valid checkpoint; collective. Each rank hashes its share of the files.

    Args:
        root: The run's `checkpoints` folder, on a file system that all ranks share.
        hashes: Compare SHA-256 as well as names and sizes.

    Returns:
        The same folder on all ranks; None if there is no valid checkpoint.
    """
    # Only rank 0 lists the folder: ranks that list it at different times could see different files.
    names = [[folder.name for folder in list_checkpoints(root)] if is_rank_zero() else []]
    dist.broadcast_object_list(names)
    for name in names[0]:
        try:
            on_all_ranks(partial(_check_share, root / name, hashes))
            return root / name
        except CheckpointError as error:
            if is_rank_zero():
                warn_skipped(str(error))
    return None


def _check_share(folder: Path, hashes: bool) -> None:
    """Check this rank's share of the files, and the scalars.

    Raises:
        CheckpointError: If one of them is damaged or cannot be read.
    """
    try:
        check_manifest(folder, hashes, (dist.get_rank(), dist.get_world_size()))
        read_state(folder)
    except OSError as error:
        raise CheckpointError(str(error)) from error


def load_checkpoint(folder: Path, engine: SAEEngine) -> CheckpointState:
    """Load weights, moments and `tokens_since_fired` into the engine; collective over all ranks.

    Args:
        folder: A checkpoint that `agreed_checkpoint` or `newest_valid` returned.
        engine: Newly built engine of the same SAE. Its mesh and ZeRO stage may differ from those
            that wrote the checkpoint.

    Returns:
        The checkpoint's scalars.

    Raises:
        CheckpointError: If the checkpoint holds another SAE or other sizes, or is damaged.
    """
    weights = weight_tensors(engine)
    moments = engine.moments()
    loaded = moment_tensors(engine, moments)

    def look() -> CheckpointState:
        state = read_state(folder)
        _check_same_sae(folder, state, engine)
        _check_shapes(folder / WEIGHTS, weights)
        _check_shapes(folder / OPTIMIZER, loaded)
        return state

    state = on_all_ranks(look)
    _load_tensors(folder / WEIGHTS, weights)
    _load_tensors(folder / OPTIMIZER, loaded)
    own = {name: local_part(weights[f"{engine.name}.{name}"]) for name in engine.sae.state_dict()}
    parameters = {name: own.pop(name) for name in engine.parameter_names}
    for name, buffer in own.items():
        engine.sae.get_buffer(name).copy_(buffer)
    local_moments = {
        name: {
            moment: local_part(loaded[f"{engine.name}.{name}.{moment}"]) for moment in moments[name]
        }
        for name in parameters
    }
    engine.load(parameters, local_moments, state.step)
    return state


def _load_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def _check_shapes(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Check that the files hold complete tensors of these shapes; the same result on all ranks."""
    layout = read_layout(folder)
    for name, tensor in wanted.items():
        if name not in layout:
            raise CheckpointError(f"{folder}: tensor {name} is missing; use another run name")
        if layout[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(layout[name].shape)}, expected "
                f"{list(tensor.shape)}; use another run name"
            )


def _check_same_sae(folder: Path, state: CheckpointState, engine: SAEEngine) -> None:
    if list(state.saes) != [engine.name]:
        raise CheckpointError(
            f"{folder}: contains SAEs {sorted(state.saes)}, expected {[engine.name]}; use another "
            "run name"
        )
    width = engine.sae.d_model
    if width != state.d_model:
        raise CheckpointError(
            f"{folder}: SAE of width {state.d_model}, expected {width}, the width of the "
            "store; use another run name, or the store that this SAE was trained on"
        )
    ours, theirs = asdict(engine.sae.config), state.saes[engine.name]
    differing = [key for key in _SIZES if ours[key] != theirs.get(key)]
    if differing:
        what = ", ".join(f"{key} {theirs.get(key)!r} -> {ours[key]!r}" for key in differing)
        raise CheckpointError(
            f"{folder}: {engine.name} was trained with other settings: {what}; use another run name"
        )
