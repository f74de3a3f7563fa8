"""Measure how well an SAE reconstructs rows, with float64 sums over batches."""

from __future__ import annotations

import torch
from torch import Tensor


class ReconstructionSums:
    """Streaming sums for the mean, fvu, mse and l0 of all rows added.

    All values are in raw activation units. fvu = sum |x - recon|^2 / sum |x - mean|^2, where the
    mean is that of the rows added. mse averages over rows and dimensions. l0 is the number of
    latents above 0 per row.
    """

    def __init__(self, d_model: int) -> None:
        self.rows = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._square = 0.0
        self._error = 0.0
        self._active = 0
        self._reconstructed = 0

    def add_rows(self, x: Tensor) -> None:
        """Add [n, D] rows to the mean and the variance."""
        x = x.double()
        self.rows += len(x)
        self._sum += x.sum(0).cpu()
        self._square += float(x.square().sum())

    def add_reconstruction(self, x: Tensor, recon: Tensor, values: Tensor) -> None:
        """Add the error of [n, D] reconstructions and the number of active [n, K] latents."""
        self._reconstructed += len(x)
        self._error += float((x.double() - recon.double()).square().sum())
        self._active += int((values > 0).sum())

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, [D] float64."""
        return self._sum / max(self.rows, 1)

    @property
    def fvu(self) -> float | None:
        """Fraction of variance unexplained; None if the rows have no variance."""
        variance = self._square - self.rows * float(self.mean.square().sum())
        return self._error / variance if variance > 0 else None

    @property
    def mse(self) -> float:
        """Mean squared error per element."""
        return self._error / (max(self._reconstructed, 1) * len(self._sum))

    @property
    def l0(self) -> float:
        """Mean number of latents above 0 per row."""
        return self._active / max(self._reconstructed, 1)
