"""A trained SAE for use: whole, in raw activation units, without ranks, optimiser or DeepSpeed."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sae_core.atomic import read_json, write_json
from sae_core.checkpoint.folder import (
    MANIFEST,
    WEIGHTS,
    CheckpointState,
    check_manifest,
    newest_valid,
    read_state,
)
from sae_core.config import SAEConfig
from sae_core.errors import CheckpointError, ShapeError
from sae_core.kernels import compact, get_kernels

_WEIGHTS_FILE, _CONFIG_FILE = "sae.safetensors", "sae.json"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


class SAE(nn.Module):
    """A TopK SAE on raw activations.

        pre_acts = (x - b_dec) @ W_enc.T + b_enc
        latents  = relu(topk(pre_acts, k))
        recon    = latents @ W_dec + b_dec

    Args:
        config: sizes; `config.k`, `config.n_latents`, `config.hookpoint`.
        W_enc: [L, D] float32.
        W_dec: [L, D] float32, unit rows.
        b_enc: [L] float32.
        b_dec: [D] float32.
        step: optimiser steps it was trained for.
        metadata: where it came from.
    """

    def __init__(
        self,
        config: SAEConfig,
        W_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor,
        step: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.step, self.metadata = config, step, metadata or {}
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self._kernels = get_kernels("stock", torch.float32)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.b_dec.shape[0]

    @torch.no_grad()
    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest latents of each row, largest first.

        Args:
            x: [..., D] raw activations of any float dtype.

        Returns:
            values [..., k] float32 after the ReLU, and indices [..., k] int64; where fewer than k
            pre-activations are positive the rest have value 0.

        Raises:
            ShapeError: x has another width.
        """
        flat = self._rows(x)
        values, indices = self._kernels.encode_topk(
            flat - self.b_dec, self.W_enc, self.b_enc, self.config.k
        )
        values, order = values.relu().sort(dim=1, descending=True, stable=True)
        shape = (*x.shape[:-1], self.config.k)
        return values.view(shape), indices.gather(1, order).view(shape)

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[..., L] float32 latents of raw activations [..., D]; dense, so for small batches."""
        values, indices = self.encode_topk(x)
        latents = values.new_zeros(*x.shape[:-1], self.config.n_latents)
        return latents.scatter_(-1, indices, values)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[..., D] float32 raw activations of dense latents [..., L]."""
        return latents @ self.W_dec + self.b_dec

    @torch.no_grad()
    def decode_topk(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """[..., D] float32 raw activations of what `encode_topk` gave."""
        k = values.shape[-1]
        active = compact(values.reshape(-1, k), indices.reshape(-1, k))
        recon = self._kernels.decode(active, self.W_dec) + self.b_dec
        return recon.view(*values.shape[:-1], self.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] float32 reconstruction of raw activations [..., D]."""
        return self.decode_topk(*self.encode_topk(x))

    def save(self, folder: Path) -> None:
        """Writes `sae.safetensors` and `sae.json`, which `load_sae` reads back."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).detach().contiguous() for name in _TENSORS}
        save_file(tensors, folder / _WEIGHTS_FILE)
        config = {"config": asdict(self.config), "step": self.step, "metadata": self.metadata}
        write_json(folder / _CONFIG_FILE, config)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"x of shape {tuple(x.shape)}: expected [..., {self.d_model}]")
        return x.reshape(-1, self.d_model).float()


def load_sae(path: str | Path, name: str | None = None) -> SAE:
    """An SAE from a run folder, a checkpoint folder or a folder that `SAE.save` wrote.

    Args:
        path: the folder. A run gives its newest valid checkpoint.
        name: which SAE of a checkpoint with several; None takes the only one.

    Raises:
        CheckpointError: there is none, it is damaged, or the name is not in it.
    """
    path = Path(path)
    if (path / _CONFIG_FILE).is_file():
        return _load_saved(path)
    if (path / MANIFEST).is_file():
        check_manifest(path)
        return _load_checkpoint(path, name)
    newest = newest_valid(path / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{path}: expected a run with a valid checkpoint, a checkpoint, or a saved SAE; "
            "train first with stage=train"
        )
    return _load_checkpoint(newest, name)


def _load_saved(folder: Path) -> SAE:
    try:
        raw = read_json(folder / _CONFIG_FILE)
        tensors = load_file(folder / _WEIGHTS_FILE)
        weights = {name: tensors[name] for name in _TENSORS}
        return SAE(
            SAEConfig(**raw["config"]), **weights, step=raw["step"], metadata=raw["metadata"]
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a saved SAE: {error}") from error


def _load_checkpoint(folder: Path, name: str | None) -> SAE:
    state = read_state(folder)
    name = _pick(folder, state, name)
    tensors = _read_weights(folder / WEIGHTS, f"{name}.")
    scale, mean = tensors["input_scale"], tensors["input_mean"]
    # x_norm = (x - mean) * scale. Latents in raw units are those of training divided by scale, so
    # decoder rows keep unit norm and the encoder matrix stays as it is.
    return SAE(
        SAEConfig(**state.saes[name]),
        W_enc=tensors["W_enc"],
        W_dec=tensors["W_dec"],
        b_enc=tensors["b_enc"] / scale,
        b_dec=mean + tensors["b_dec"] / scale,
        step=state.step,
        metadata={
            "checkpoint": folder.name,
            "name": name,
            "tokens": state.tokens,
            "seed": state.seed,
            "input_scale": float(scale),
        },
    )


def _pick(folder: Path, state: CheckpointState, name: str | None) -> str:
    if name is None and len(state.saes) == 1:
        return next(iter(state.saes))
    if name not in state.saes:
        raise CheckpointError(f"{folder}: holds SAEs {sorted(state.saes)}, {name!r} was asked for")
    return str(name)


def _read_weights(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Whole tensors under `prefix`, put together from the row ranges on disk."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # It says that there is one process only, which is what is meant here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in wanted.items()}
