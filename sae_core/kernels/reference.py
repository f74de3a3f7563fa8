"""The reference kernels: dense and slow, in any float dtype.

They define the results that the other implementations must produce.
"""

from __future__ import annotations

import torch

from foundation.errors import ConfigError
from sae_core.kernels.interface import RowGradients, SparseLatents
from sae_core.kernels.torch_kernels import TorchKernels


class ReferenceKernels(TorchKernels):
    """Dense implementation of every operation; see `Kernels`."""

    name = "reference"

    def select(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` on all latents."""
        pre_acts = x @ W_enc.T + b_enc
        # A stable descending sort leaves equal values in ascending latent order; NaN sorts first.
        values, latents = pre_acts.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), latents[:, :k].contiguous()

    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """See `Kernels.decode`."""
        return _dense(active, W_dec.shape[0]) @ W_dec

    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`."""
        return (vectors @ matrix.T)[active.rows, active.latents]

    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """See `Kernels.row_gradients`."""
        latents, slots = active.latents.unique(return_inverse=True)
        acts = x.new_zeros(x.shape[0], len(latents))
        dpre = x.new_zeros(x.shape[0], len(latents))
        acts[active.rows, slots] = active.values
        dpre[active.rows, slots] = dvalues
        return RowGradients(latents, acts.T @ error, dpre.T @ x, dpre.sum(0))


def build(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> ReferenceKernels:
    """Build these kernels with the settings of training; see `get_kernels`."""
    if tf32:
        raise ConfigError("train.compute_dtype", "tf32", "float32 for kernels=reference")
    if compute_dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            "compute dtype", compute_dtype, "float32 or float64 for kernels=reference"
        )
    if prefilter != "none":
        raise ConfigError("train.prefilter", prefilter, "none for kernels=reference")
    return ReferenceKernels()


def _dense(active: SparseLatents, n_latents: int) -> torch.Tensor:
    """Return the activations as a dense matrix, [B, n_latents]."""
    acts = active.values.new_zeros(len(active.offsets), n_latents)
    acts[active.rows, active.latents] = active.values
    return acts
