"""Base class of the kernels in plain torch operations, `StockKernels` and `ReferenceKernels`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sae_core.kernels.interface import (
    Affine,
    Centred,
    Decoded,
    RowGradients,
    RowUpdate,
    SparseGradient,
    SparseLatents,
    Subset,
)
from sae_core.kernels.stock.update import StockRowUpdate


class TorchKernels(ABC):
    """Base of kernels in torch operations; see `Kernels`. The host waits for the device."""

    name: str
    asynchronous = False
    copy_dtype: torch.dtype | None = None
    gather_dtype: torch.dtype | None = None

    @abstractmethod
    def select(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `encode_topk` on all latents."""

    @abstractmethod
    def decode(self, active: SparseLatents, W_dec: torch.Tensor) -> torch.Tensor:
        """See `Kernels.decode`."""

    @abstractmethod
    def decoder_dot(
        self, vectors: torch.Tensor, active: SparseLatents, matrix: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels.decoder_dot`."""

    @abstractmethod
    def row_gradients(
        self, active: SparseLatents, dvalues: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> RowGradients:
        """See `Kernels.row_gradients`."""

    def centre(self, raw: torch.Tensor, affine: Affine) -> Centred:
        """See `Kernels.centre`."""
        x = (raw.to(torch.promote_types(raw.dtype, torch.float32)) - affine.mean) * affine.scale
        return Centred(x - affine.bias, raw, affine, x.sum(0), x.square().sum())

    def encode_topk(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        k: int,
        among: Subset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.encode_topk`."""
        if among is None:
            return self.select(x, W_enc, b_enc, k)
        members = among.indices[: int(among.size)]
        found = min(k, len(members))
        values, latents = self.select(x, W_enc[members], b_enc[members], found)
        padded = values.new_full((len(x), k), float("-inf"))
        padded[:, :found] = values
        indices = latents.new_zeros(len(x), k)
        indices[:, :found] = members[latents]
        return padded, indices

    def decode_error(
        self, target: torch.Tensor | Centred, active: SparseLatents, W_dec: torch.Tensor
    ) -> Decoded:
        """See `Kernels.decode_error`."""
        decoded = self.subtract(target, self.decode(active, W_dec))
        return decoded._replace(dots=self.decoder_dot(decoded.error, active, W_dec))

    def subtract(self, target: torch.Tensor | Centred, recon: torch.Tensor) -> Decoded:
        """See `Kernels.subtract`."""
        rows = target.rows if isinstance(target, Centred) else target
        error = rows - recon.to(rows.dtype)
        wide = error.to(torch.promote_types(error.dtype, torch.float32))
        return Decoded(error, error.new_empty(0), wide.square().sum(), wide.sum(0))

    def row_update(self, gradient: SparseGradient, W_dec: torch.Tensor) -> RowUpdate:
        """See `Kernels.row_update`."""
        return StockRowUpdate(self, gradient, W_dec)
