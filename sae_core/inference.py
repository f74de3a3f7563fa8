"""Inference with a trained SAE in one process, on raw activations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from foundation.errors import ConfigError
from foundation.registry import import_attribute
from sae_core.architectures.registry import architecture_of
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.stored_sae import MATRICES, StoredSAE, row_names
from sae_core.errors import ShapeError
from sae_core.inference_gradients import active_values, needs_gradient, product, weighted_rows
from sae_core.kernels import Kernels, compact, get_kernels
from sae_core.kernels.keys import pack_keys, unpack_keys
from sae_core.kernels.registry import default_kernels
from sae_core.peer_formats import open_any


class SparseCoder(Protocol):
    """A trained SAE as evaluations use it, whole (`SAE`) or in shards (`ShardedSAE`)."""

    @property
    def config(self) -> SAEConfig:
        """Settings of the SAE."""
        ...

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        ...

    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SAE.encode_topk`."""
        ...

    def decode_topk(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """See `SAE.decode_topk`."""
        ...


class SAE(nn.Module, ABC):
    """A trained SAE that takes and returns raw activations.

    Each architecture has a subclass; `load_sae` picks it.

    Gradients flow through all methods, to activations and latents, and to weights whose
    `requires_grad` is set. The choice of the active latents has none. Results are float32, and on
    the device of the SAE.

    A subclass must also work on a shard, which is an SAE with l of the L rows of every tensor that
    has one row per latent. `config` is that of the whole SAE, and indices count from the shard's
    first row. `encode_topk` then returns the latents of the shard that may be active, and `merge`
    chooses among those of several shards.

    Args:
        config: Settings; `architecture`, sizes and `hookpoint` are used.
        W_enc: [L, D] in float32, or in a 16-bit dtype, which is converted to float32 in pieces. A
            shard that encodes has it in `Kernels.copy_dtype`; one that only decodes has no rows.
        W_dec: [L, D] in the dtype of W_enc, or float32. A shard that only encodes has no rows.
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
        self._kernels: Kernels | None = None
        self._device_type = ""

    @property
    def kernels(self) -> Kernels:
        """Implementation of the sparse operations.

        The default is the Triton kernels on CUDA and the stock kernels on other devices; it changes
        when the SAE is moved. It multiplies in float32, except that on CUDA bfloat16 weights are
        not converted.

        Raises:
            ConfigError: If the SAE is on CUDA and Triton is not installed.
        """
        device = self.b_dec.device.type
        if self._kernels is None or self._device_type not in ("", device):
            name = default_kernels(device)
            # The Triton encoder multiplies 16-bit weights as they are, and sums in float32.
            is_half = name == "triton" and self.W_enc.dtype == torch.bfloat16
            self._kernels = get_kernels(name, torch.bfloat16 if is_half else torch.float32)
            self._device_type = device
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._device_type = ""  # chosen by the caller, for every device

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.b_dec.shape[0]

    def encode_topk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the active latents of each row, in descending order of their values.

        Args:
            x: [..., D] raw activations of any float dtype, on the SAE's device.

        Returns:
            Values [..., K] float32 and indices [..., K] int64, where K is the largest number of
            latents that can be active. If fewer are active, the remaining values are 0.

        Raises:
            ShapeError: If the last dimension of `x` is not D.
        """
        flat = self.rows_of(x)
        with torch.no_grad():
            values, indices = self.encode_rows(flat)
        if needs_gradient(flat, self.W_enc, self.b_enc, self.b_dec):
            values = active_values(flat - self.b_dec, self.W_enc, self.b_enc, values, indices)
        shape = (*x.shape[:-1], values.shape[-1])
        return values.view(shape), indices.view(shape)

    @abstractmethod
    def encode_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the active latents of each row, in descending order of their values.

        `encode_topk` calls this without gradients, and adds those of the pre-activations,
        `(x - b_dec) @ W_enc.T + b_enc`. If the value of an active latent is not its pre-activation
        plus a constant, override `encode_topk` as well.

        Args:
            x: [N, D] float32 raw activations.

        Returns:
            As `encode_topk`, for N rows.
        """

    @classmethod
    def merge(
        cls, config: SAEConfig, values: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the active latents of each row among those of several shards.

        The default keeps the `config.active_latents()` largest or, if their number depends on the
        data, all that are above 0. Ties go to the lowest index. A subclass whose selection differs
        overrides this. Shards are merged one after another, so the choice must not depend on their
        order.

        Args:
            config: Settings of the whole SAE.
            values: [R, C] float32, from `encode_topk` of the shards.
            indices: [R, C] int64 indices in the whole dictionary.

        Returns:
            Values [R, K] float32 in descending order, and indices [R, K] int64.
        """
        keys = pack_keys(values, indices)
        wanted = config.active_latents()
        if wanted is None:
            counts = (~(values <= 0)).sum(1)  # not "values > 0", which would drop NaN
            wanted = int(counts.max()) if len(counts) else 0
        return unpack_keys(keys.topk(min(wanted, keys.shape[1]), dim=1).values)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode raw activations [..., D] into dense latents [..., L], float32.

        The result is large; for big batches use `encode_topk`.
        """
        values, indices = self.encode_topk(x)
        latents = values.new_zeros(*x.shape[:-1], self.config.n_latents)
        return latents.scatter_add(-1, indices, values)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode dense latents [..., L] into raw activations [..., D], float32."""
        return product(latents.float(), self.W_dec) + self.b_dec

    def decode_topk(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Decode the output of `encode_topk` into raw activations [..., D], float32.

        Values of 0 or less are ignored.
        """
        # Not -1, which is ambiguous if no latent is active.
        shape = (math.prod(values.shape[:-1]), values.shape[-1])
        recon = self.decode_rows(values.reshape(shape), indices.reshape(shape)) + self.b_dec
        return recon.view(*values.shape[:-1], self.d_model)

    def decode_rows(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return each row's sum of `value * W_dec[index]`, [N, D] float32, without `b_dec`.

        Args:
            values: [N, K] float32; values of 0 or less are ignored.
            indices: [N, K] int64.
        """
        if needs_gradient(values, self.W_dec) or self.W_dec.dtype != torch.float32:
            return weighted_rows(values.float().relu(), indices, self.W_dec)
        return self.kernels.decode(compact(values, indices), self.W_dec)

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
    path: str | Path,
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    verify_hashes: bool = True,
    allow_pt: bool = False,
) -> SAE:
    """Load an SAE from a run, a checkpoint, a saved SAE, or a file of another library.

    Weights are read in blocks of a few MiB, straight to the device and in the requested dtype, so
    that nothing else is held in memory.

    Args:
        path: Run folder (its newest valid checkpoint is loaded), checkpoint folder, folder written
            by `SAE.save`, or a plain TopK SAE of SAELens, sparsify or dictionary_learning (a folder
            or a `.pt` file).
        name: Name of the SAE. It may be None if the checkpoint holds only one.
        device: Device to load it to.
        dtype: Dtype of the matrices `W_enc` and `W_dec`: float32, or bfloat16 or float16 for half
            of the memory. Vectors and results are float32.
        verify_hashes: Verify the SHA-256 of every file of a checkpoint first.
        allow_pt: Allow a `.pt` file to be read. Such a file is a pickle. It is loaded with torch's
            restricted loader (`weights_only=True`), which accepts only tensors and plain values.

    Raises:
        CheckpointError: If no SAE is found, the SAE is damaged, or `name` is not in the checkpoint.
        ConfigError: If `dtype` is not one of these.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError("dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")
    stored = open_any(Path(path), name, verify_hashes, allow_pt)
    tensors = {
        row_name: stored.whole(row_name, dtype if row_name in MATRICES else torch.float32, device)
        for row_name in row_names(stored.config)
    }
    return inference_class(stored.config)(
        stored.config,
        **tensors,
        b_dec=stored.b_dec.to(device),
        step=stored.step,
        metadata=stored.metadata,
    )


def inference_class(config: SAEConfig) -> type[SAE]:
    """Return the subclass of `SAE` that an SAE's architecture names.

    Raises:
        ConfigError: If the architecture is unknown.
    """
    inference: type[SAE] = import_attribute(architecture_of(config).inference)
    return inference


def _slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]
