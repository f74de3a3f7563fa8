"""Inference with a trained SAE in one process, on raw activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foundation.registry import import_attribute
from sae_core import peer_formats
from sae_core.architectures.registry import architecture_of
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.stored_sae import StoredSAE, open_sae, row_names
from sae_core.errors import ShapeError
from sae_core.kernels import compact, get_kernels


class SAE(nn.Module, ABC):
    """A trained SAE that takes and returns raw activations.

    Each architecture has a subclass; `load_sae` picks it.

    Args:
        config: Settings; `architecture`, sizes and `hookpoint` are used.
        W_enc: [L, D] float32.
        W_dec: [L, D] float32.
        b_enc: [L] float32.
        b_dec: [D] float32.
        step: Number of optimiser steps for which the SAE was trained.
        metadata: Information about the SAE's origin.
        vectors: The architecture's other tensors (`Architecture.vectors`), [L] float32 each. They
            become attributes.
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
        **vectors: torch.Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self.step = step
        self.metadata = metadata or {}
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        for name, vector in vectors.items():
            self.register_parameter(name, nn.Parameter(vector, requires_grad=False))
        self.kernels = get_kernels("stock", torch.float32)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.b_dec.shape[0]

    @abstractmethod
    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the active latents of each row, in descending order of their values.

        Args:
            x: [..., D] raw activations of any float dtype.

        Returns:
            Values [..., K] float32 and indices [..., K] int64, where K is the largest number of
            latents that can be active. If fewer are active, the remaining values are 0.

        Raises:
            ShapeError: If the last dimension of `x` is not D.
        """

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode raw activations [..., D] into dense latents [..., L], float32.

        The result is large; for big batches use `encode_topk`.
        """
        values, indices = self.encode_topk(x)
        latents = values.new_zeros(*x.shape[:-1], self.config.n_latents)
        return latents.scatter_(-1, indices, values)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode dense latents [..., L] into raw activations [..., D], float32."""
        return latents @ self.W_dec + self.b_dec

    @torch.no_grad()
    def decode_topk(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Decode the output of `encode_topk` into raw activations [..., D], float32."""
        k = values.shape[-1]
        active = compact(values.reshape(-1, k), indices.reshape(-1, k))
        recon = self.kernels.decode(active, self.W_dec) + self.b_dec
        return recon.view(*values.shape[:-1], self.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction [..., D], float32, of raw activations [..., D]."""
        return self.decode_topk(*self.encode_topk(x))

    def stored(self) -> StoredSAE:
        """Return this SAE as a `StoredSAE`, which the exporters accept."""
        names = row_names(self.config)
        rows = {name: partial(_slice, getattr(self, name).detach()) for name in names}
        b_dec = self.b_dec.detach()
        return StoredSAE(self.config, self.d_model, b_dec, rows, self.step, self.metadata)

    def save(self, folder: Path) -> None:
        """Write `sae.safetensors` and `sae.json` into a folder; `load_sae` reads them back."""
        self.stored().save(folder)

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return raw activations [..., D] as [N, D] float32.

        Raises:
            ShapeError: If the last dimension of `x` is not D.
        """
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"x of shape {tuple(x.shape)}: expected [..., {self.d_model}]")
        return x.reshape(-1, self.d_model).float()


def load_sae(
    path: str | Path, name: str | None = None, *, verify_hashes: bool = True, allow_pt: bool = False
) -> SAE:
    """Load an SAE from a run, a checkpoint, a saved SAE, or a file of another library.

    Args:
        path: Run folder (its newest valid checkpoint is loaded), checkpoint folder, folder written
            by `SAE.save`, or a plain TopK SAE of SAELens, sparsify or dictionary_learning (a folder
            or a `.pt` file).
        name: Name of the SAE. It may be None if the checkpoint holds only one.
        verify_hashes: Verify the SHA-256 of every file of a checkpoint first.
        allow_pt: Allow a `.pt` file to be read. Such a file is a pickle. It is loaded with torch's
            restricted loader (`weights_only=True`), which accepts only tensors and plain values.

    Raises:
        CheckpointError: If no SAE is found, the SAE is damaged, or `name` is not in the checkpoint.
    """
    path = Path(path)
    peer = peer_formats.find(path)
    if peer is None:
        stored = open_sae(path, name, verify_hashes)
    else:
        stored = peer_formats.open_peer(peer, path, allow_pt)
    tensors = {name: stored.whole(name) for name in row_names(stored.config)}
    inference = import_attribute(architecture_of(stored.config).inference)
    sae: SAE = inference(
        stored.config, **tensors, b_dec=stored.b_dec, step=stored.step, metadata=stored.metadata
    )
    return sae


def _slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]
