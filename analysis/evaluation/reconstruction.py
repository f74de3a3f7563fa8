"""Measure how well an SAE reconstructs rows, using float64 sums over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from analysis.evaluation.measurement import Accumulator, Rows

if TYPE_CHECKING:
    from sae_core.inference import SparseCoder


class ReconstructionSums(Accumulator):
    """Sums for the fvu, mse and l0 of all rows added, in raw activation units.

    fvu = sum |x - recon|^2 / sum |x - mean|^2, where mean is the mean of the rows added. mse is
    averaged over rows and dimensions. l0 is the mean number of latents above 0 per row. Sums are of
    the rows minus a typical training row, so that a large mean does not cost precision.
    """

    def __init__(self, sae: SparseCoder) -> None:
        super().__init__(sae)
        self.n_rows = 0
        self._origin = torch.zeros(sae.d_model, dtype=torch.float64)
        self._sum = torch.zeros(sae.d_model, dtype=torch.float64)
        self._square = 0.0
        self._error = 0.0
        self._active = 0
        self._row_errors: list[torch.Tensor] = []
        self._row_distances: list[torch.Tensor] = []

    def start(self, typical: torch.Tensor) -> None:
        """Take a typical training row as the origin."""
        self._origin = typical.double().cpu()

    def add_rows(self, rows: Rows) -> None:
        """Add a batch of rows and their reconstructions."""
        x = rows.x.double() - self._origin.to(rows.x.device)
        distances = x.square().sum(1)
        errors = (rows.x.double() - rows.recon.double()).square().sum(1)
        self.n_rows += len(x)
        self._sum += x.sum(0).cpu()
        self._square += float(distances.sum())
        self._error += float(errors.sum())
        self._row_errors.append(errors.cpu())
        self._row_distances.append(distances.cpu())
        self._active += int((rows.values > 0).sum())

    @property
    def fvu(self) -> float | None:
        """Fraction of variance unexplained; None if the rows have no variance."""
        mean = self._sum / max(self.n_rows, 1)
        variance = self._square - self.n_rows * float(mean.square().sum())
        return self._error / variance if variance > 0 else None

    @property
    def fvu_median(self) -> float | None:
        """Median over rows of |x - recon|^2 / |x - typical|^2; None if there are no rows."""
        distances = torch.cat([torch.zeros(0).double(), *self._row_distances])
        errors = torch.cat([torch.zeros(0).double(), *self._row_errors])
        ratios = (errors / distances)[distances > 0].sort().values
        n_rows = len(ratios)
        # torch.median returns the lower of the two middle values.
        return float(ratios[(n_rows - 1) // 2] + ratios[n_rows // 2]) / 2 if n_rows else None

    @property
    def top_share(self) -> float | None:
        """Share of sum |x - typical|^2 that comes from the 1% of the rows farthest from it."""
        distances = torch.cat([torch.zeros(0).double(), *self._row_distances])
        total = float(distances.sum())
        n_top = -(-len(distances) // 100)
        return float(distances.topk(n_top).values.sum()) / total if total else None

    @property
    def mse(self) -> float | None:
        """Mean squared error per element; None if there are no rows."""
        return self._error / (self.n_rows * len(self._sum)) if self.n_rows else None

    @property
    def l0(self) -> float | None:
        """Mean number of latents above 0 per row; None if there are no rows."""
        return self._active / self.n_rows if self.n_rows else None
