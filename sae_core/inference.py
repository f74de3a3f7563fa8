"""A trained SAE for use: whole, in raw activation units, without ranks, optimiser or DeepSpeed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae_core import peer_files
from sae_core.config import SAEConfig
from sae_core.errors import ShapeError
from sae_core.kernels import compact, get_kernels
from sae_core.stored import ROWS, StoredSAE, open_sae


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

    def stored(self) -> StoredSAE:
        """The same, as what is read by rows: for writing it in some format."""
        rows = {name: partial(_slice, getattr(self, name).detach()) for name in ROWS}
        b_dec = self.b_dec.detach()
        return StoredSAE(self.config, self.d_model, b_dec, rows, self.step, self.metadata)

    def save(self, folder: Path) -> None:
        """Writes `sae.safetensors` and `sae.json`, which `load_sae` reads back."""
        self.stored().save(folder)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"x of shape {tuple(x.shape)}: expected [..., {self.d_model}]")
        return x.reshape(-1, self.d_model).float()


def load_sae(
    path: str | Path, name: str | None = None, *, verify_hashes: bool = True, allow_pt: bool = False
) -> SAE:
    """An SAE from a run, a checkpoint, a folder that `SAE.save` wrote, or a peer's files.

    Args:
        path: the folder, or a peer's `.pt` file. A run gives its newest valid checkpoint. Of peers,
            SAELens, sparsify and dictionary_learning are known, with plain TopK.
        name: which SAE of a checkpoint with several; None takes the only one.
        verify_hashes: hold every file of a checkpoint against its SHA-256 first.
        allow_pt: read a `.pt` file. It is a pickle, of which torch's restricted loader
            (`weights_only=True`) takes tensors and plain values; trust it as far as that loader.

    Raises:
        CheckpointError: there is none, it is damaged, or the name is not in it.
    """
    path = Path(path)
    foreign = peer_files.find(path)
    stored = open_sae(path, name, verify_hashes) if foreign is None else foreign(path, allow_pt)
    tensors = {name: stored.whole(name) for name in ROWS}
    return SAE(
        stored.config, **tensors, b_dec=stored.b_dec, step=stored.step, metadata=stored.metadata
    )


def _slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]
