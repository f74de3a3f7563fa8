"""A trained SAE on disk, in raw activation units, read by ranges of latents.

Checkpoints, saved SAEs and files of other libraries all provide the same interface: rows of `W_enc`
and `W_dec` [L, D], of `b_enc` and the architecture's other vectors [L], and `b_dec` [D], all
float32. Apart from `b_dec`, tensors are read on demand, so an SAE of any size can be converted to
another format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foundation.atomic_files import read_json, write_json
from sae_core.architectures.registry import architecture_of, check_settings, settings_from_json
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.folder import (
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointState,
    check_manifest,
    newest_valid,
    read_state,
    weights_digest,
)
from sae_core.checkpoint.row_ranges import Piece, StoredTensor, read_layout
from sae_core.checkpoint.safetensors_file import TensorFileWriter, read_header, rows_per_block
from sae_core.config import CHECKPOINTS
from sae_core.errors import CheckpointError, DamagedCheckpointError

Rows = Callable[[int, int], torch.Tensor]
"""Function that takes `start, stop` and returns rows [start, stop) of a tensor, float32."""
WEIGHTS_FILE, CONFIG_FILE = "sae.safetensors", "sae.json"
MATRICES = ("W_enc", "W_dec")
"""Names of the [L, D] tensors; all other tensors with one row per latent are [L]."""
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredSAE:
    """An SAE whose tensors are read on demand. To encode and decode, use `load_sae`."""

    config: SAEConfig
    d_model: int
    """Width of the activations."""
    b_dec: torch.Tensor
    """[D] float32."""
    rows: Mapping[str, Rows]
    """Row readers of the tensors in `row_names`, keyed by name. Those of `W_enc` and `W_dec` return
    [n, D], the others [n]."""
    step: int = 0
    """Number of optimiser steps for which the SAE was trained."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Information about the SAE's origin."""
    tokens_since_fired: Rows | None = None
    """Row reader of training's counter [L] int64: number of training tokens since each latent last
    fired. None if the SAE is not from a checkpoint."""
    digest: str | None = None
    """Identity of the weights, if it is known without reading them; see `weights_sha256`."""

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows) for consecutive blocks of a tensor, a few MiB each."""
        n_latents = self.config.n_latents
        step = rows_per_block(4 * (self.d_model if name in MATRICES else 1))
        for start in range(0, n_latents, step):
            yield start, self.rows[name](start, min(start + step, n_latents))

    def whole(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """Read a tensor in full, block by block: [L, D] or [L]."""
        shape = (self.config.n_latents, self.d_model)
        out = torch.empty(shape if name in MATRICES else shape[:1], dtype=dtype, device=device)
        for start, rows in self.blocks(name):
            out[start : start + len(rows)] = rows
        return out

    def weights_sha256(self) -> str:
        """Return a hash that changes with the weights.

        For a checkpoint it is derived from the hashes in its manifest, so that no weight is read.
        It then also changes when the rows are divided into other files, or another SAE of the
        checkpoint changes.
        Otherwise all tensors are read and hashed.
        """
        if self.digest is not None:
            return self.digest
        sha256 = hashlib.sha256()
        for name in row_names(self.config):
            for _, rows in self.blocks(name):
                sha256.update(rows.contiguous().numpy().data)
        sha256.update(self.b_dec.contiguous().numpy().data)
        return sha256.hexdigest()

    def dead_fraction(self) -> float | None:
        """Return the fraction of latents that are dead according to training's own counter.

        A latent is dead if it has not fired on the last `dead_after_tokens` training tokens. The
        result is None if the SAE is not from a checkpoint, or was trained on fewer tokens.
        """
        after = self.config.dead_after_tokens
        if self.tokens_since_fired is None or after is None:
            return None
        if self.metadata.get("tokens", 0) < after:
            return None
        n_latents = self.config.n_latents
        step = rows_per_block(torch.int64.itemsize)
        dead = 0
        for start in range(0, n_latents, step):
            counter = self.tokens_since_fired(start, min(start + step, n_latents))
            dead += int((counter >= after).sum())
        return dead / n_latents

    def save(self, folder: Path) -> None:
        """Write `sae.safetensors` and `sae.json` into a folder; `load_sae` reads them back.

        The weights are copied in pieces of a few MiB.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = {name: name for name in (*row_names(self.config), "b_dec")}
        # Replace the old file only when the new one is complete: the old file may be the source.
        temporary = folder / f"{WEIGHTS_FILE}.tmp"
        temporary.unlink(missing_ok=True)
        write_rows(self, temporary, names)
        os.replace(temporary, folder / WEIGHTS_FILE)
        config = {"config": asdict(self.config), "step": self.step, "metadata": self.metadata}
        write_json(folder / CONFIG_FILE, config)


def row_names(config: SAEConfig) -> tuple[str, ...]:
    """Return the names of an SAE's stored tensors that have one row per latent.

    Raises:
        ConfigError: If the architecture is unknown.
    """
    return (*MATRICES, "b_enc", *(vector.name for vector in architecture_of(config).vectors))


def write_rows(sae: StoredSAE, path: Path, names: Mapping[str, str], transposed: str = "") -> None:
    """Write an SAE as a float32 safetensors file, in pieces of a few MiB.

    Args:
        sae: The SAE to write.
        path: The file to create; it must not exist.
        names: `{our name: name in the file}` for `b_dec` and the tensors in `row_names`, in file
            order.
        transposed: Our name of a matrix to store as [D, L] instead of [L, D]. If empty, no matrix
            is transposed.
    """
    n_latents, width = sae.config.n_latents, sae.d_model
    shapes: dict[str, tuple[int, ...]] = {name: (n_latents,) for name in names}
    shapes |= {name: (n_latents, width) for name in MATRICES}
    shapes["b_dec"] = (width,)
    if transposed:
        shapes[transposed] = (width, n_latents)
    layout = {theirs: (torch.float32, shapes[ours]) for ours, theirs in names.items()}
    with TensorFileWriter(path, layout) as file:
        file.write_rows(names["b_dec"], 0, sae.b_dec)
        for ours in names:
            if ours == "b_dec":
                continue
            write = file.write_columns if ours == transposed else file.write_rows
            for start, rows in sae.blocks(ours):
                write(names[ours], start, rows)


def open_sae(path: str | Path, name: str | None = None, verify_hashes: bool = True) -> StoredSAE:
    """Open an SAE from a run folder, a checkpoint, or a folder written by `StoredSAE.save`.

    Args:
        path: The folder. For a run folder, its newest valid checkpoint is opened.
        name: Name of the SAE. It may be None if the checkpoint holds only one.
        verify_hashes: Verify the SHA-256 of every file of a checkpoint first.

    Raises:
        CheckpointError: If no SAE is found, the SAE is damaged, or `name` is not in the checkpoint.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        return _open_saved(path)
    if (path / MANIFEST).is_file():
        check_manifest(path, verify_hashes)
        return open_checkpoint(path, name)
    newest = newest_valid(path / CHECKPOINTS, verify_hashes)
    if newest is None:
        raise CheckpointError(
            f"{path}: no SAE found: expected a run with a valid checkpoint, a checkpoint, or a "
            "saved SAE; train one with stage=train"
        )
    return open_checkpoint(newest, name)


def _open_saved(folder: Path) -> StoredSAE:
    try:
        raw = read_json(folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
        config = settings_from_json(raw["config"])
        step, metadata = raw["step"], raw["metadata"]
        if type(step) is not int or not isinstance(metadata, dict):
            raise ValueError("expected step to be an integer and metadata to be an object")
        tensors = open_tensors(folder / WEIGHTS_FILE)
        return from_tensors(config, tensors, step, metadata)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{folder}: not a valid saved SAE: {error}") from error


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Open the tensors of a safetensors file that holds all of their rows."""
    return {
        name: StoredTensor(entry.dtype, entry.shape, (Piece(path, entry, 0),))
        for name, entry in read_header(path).entries.items()
    }


def from_tensors(
    config: SAEConfig,
    tensors: Mapping[str, StoredTensor],
    step: int = 0,
    metadata: dict[str, Any] | None = None,
) -> StoredSAE:
    """Build a `StoredSAE` from tensors on disk that use our names and raw activation units.

    Raises:
        ValueError: If a tensor is missing, a shape does not match `config`, or `config` is invalid.
    """
    width = check_shapes(config, {name: part.shape for name, part in tensors.items()})
    rows = {name: _float_rows(tensors[name]) for name in row_names(config)}
    return StoredSAE(config, width, tensors["b_dec"].whole().float(), rows, step, metadata or {})


def check_shapes(config: SAEConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Check that the shapes of all tensors match `config`, and return the width D.

    Raises:
        ValueError: If a tensor is missing, a shape does not match, or `config` is invalid.
    """
    check_settings(config)
    b_dec = shapes.get("b_dec", ())
    width, n_latents = b_dec[0] if len(b_dec) == 1 else 0, config.n_latents
    for name in row_names(config):
        shape = (n_latents, width) if name in MATRICES else (n_latents,)
        if shapes.get(name) != shape:
            raise ValueError(f"{name} has shape {shapes.get(name)}, expected {shape}")
    return width


def _float_rows(tensor: StoredTensor, divisor: torch.Tensor | None = None) -> Rows:
    if divisor is None:
        return lambda start, stop: tensor.rows(start, stop).float()
    return lambda start, stop: tensor.rows(start, stop) / divisor


def _mapped_rows(tensor: StoredTensor, map_: torch.Tensor) -> Rows:
    return lambda start, stop: _apply(tensor.rows(start, stop), map_)


def _apply(rows: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
    """Apply a map of the inputs, [D] or [D, D] float64, to rows [..., D]. Return float32."""
    wide = rows.double()
    return (wide * map_ if map_.ndim == 1 else wide @ map_).float()


def _check_map(config: SAEConfig, width: int, stored: Mapping[str, StoredTensor]) -> None:
    """Check the shapes of the map of the inputs.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    shape = config.map_shape(width)
    if shape is None:
        return
    found = [stored[name].shape for name in ("input_center", "input_map")]
    if found != [(width,), shape]:
        raise ValueError(f"input_center or input_map: expected shapes ({width},) and {shape}")


def open_checkpoint(folder: Path, name: str | None = None) -> StoredSAE:
    """Open an SAE of a checkpoint whose manifest has been checked.

    Raises:
        DamagedCheckpointError: If the state or the tensors are invalid.
        CheckpointError: If the checkpoint has no SAE named `name`, or if `name` is None and the
            checkpoint has several SAEs.
        ConfigError: If no installed package provides its architecture.
    """
    state = read_state(folder)
    name = _pick(folder, state, name)
    config = settings_from_json(state.saes[name])  # `read_state` has checked it
    try:
        stored = _under(read_layout(folder / WEIGHTS), f"{name}.")
        width = check_shapes(config, {key: tensor.shape for key, tensor in stored.items()})
        if (stored["input_scale"].shape, stored["input_mean"].shape) != ((), (width,)):
            raise ValueError(f"input_scale or input_mean: expected shapes () and ({width},)")
        _check_map(config, width, stored)
    except (ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"{folder / STATE} and {WEIGHTS}: {error}") from error
    return _in_raw_units(folder, state, name, config, stored)


def _in_raw_units(
    folder: Path,
    state: CheckpointState,
    name: str,
    config: SAEConfig,
    stored: Mapping[str, StoredTensor],
) -> StoredSAE:
    # Training uses x_norm = (x - mean) * scale. In raw units the latents are those of training
    # divided by scale, so decoder rows keep unit norm and the encoder matrix does not change.
    scale, mean = stored["input_scale"].whole(), stored["input_mean"].whole()
    rows = {name: _float_rows(stored[name]) for name in MATRICES}
    b_dec = mean + stored["b_dec"].whole() / scale
    if config.map_shape(len(b_dec)) is not None:
        # Training mapped the activations first. The map is symmetric, so that the products with
        # encoder rows are those of raw activations with mapped rows.
        forward = stored["input_map"].whole().double()
        backward = 1 / forward if forward.ndim == 1 else torch.linalg.inv(forward)
        rows = {
            "W_enc": _mapped_rows(stored["W_enc"], forward),
            "W_dec": _mapped_rows(stored["W_dec"], backward),
        }
        b_dec = stored["input_center"].whole() + _apply(b_dec, backward)
    rows["b_enc"] = _float_rows(stored["b_enc"], scale)
    for vector in architecture_of(config).vectors:
        divisor = scale if vector.in_activation_units else None
        rows[vector.name] = _float_rows(stored[vector.name], divisor)
    metadata = {
        "checkpoint": folder.name,
        "name": name,
        "tokens": state.tokens,
        "seed": state.seed,
        "input_scale": float(scale),
    }
    return StoredSAE(
        config,
        len(b_dec),
        b_dec,
        rows,
        state.step,
        metadata,
        stored["tokens_since_fired"].rows if "tokens_since_fired" in stored else None,
        weights_digest(folder),
    )


def _under(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _pick(folder: Path, state: CheckpointState, name: str | None) -> str:
    if name is None and len(state.saes) == 1:
        return next(iter(state.saes))
    if name not in state.saes:
        raise CheckpointError(f"{folder}: SAE name={name!r}: expected one of {sorted(state.saes)}")
    return str(name)
