"""Measure how well an SAE reconstructs rows, using float64 sums over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from analysis.evaluation.measurement import Accumulator, Rows

if TYPE_CHECKING:
    from sae_core import SAE


class ReconstructionSums(Accumulator):
    """Sums for the fvu, mse and l0 of all rows added, in raw activation units.

    fvu = sum |x - recon|^2 / sum |x - mean|^2, where mean is the mean of the rows added. mse is
    averaged over rows and dimensions. l0 is the mean number of latents above 0 per row.
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        self.n_rows = 0
        self._sum = torch.zeros(sae.d_model, dtype=torch.float64)
        self._square = 0.0
        self._error = 0.0
        self._active = 0

    def add_rows(self, rows: Rows) -> None:
        """Add a batch of rows and their reconstructions."""
        x = rows.x.double()
        self.n_rows += len(x)
        self._sum += x.sum(0).cpu()
        self._square += float(x.square().sum())
        self._error += float((x - rows.recon.double()).square().sum())
        self._active += int((rows.values > 0).sum())

    @property
    def fvu(self) -> float | None:
        """Fraction of variance unexplained; None if the rows have no variance."""
        mean = self._sum / max(self.n_rows, 1)
        variance = self._square - self.n_rows * float(mean.square().sum())
        return self._error / variance if variance > 0 else None

    @property
    def mse(self) -> float:
        """Mean squared error per element."""
        return self._error / (max(self.n_rows, 1) * len(self._sum))

    @property
    def l0(self) -> float:
        """Mean number of latents above 0 per row."""
        return self._active / max(self.n_rows, 1)
