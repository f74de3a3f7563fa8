"""How well a dictionary reconstructs rows, summed batch by batch in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class ReconstructionSums:
    """Streaming sums over rows: mean, fvu, mse and l0 of all rows that were added.

    All in raw activation units. fvu = sum |x - recon|^2 / sum |x - mean|^2, the mean being that of
    the rows added; mse is over rows and dimensions; l0 counts latents above 0 per row.
    """

    def __init__(self, d_model: int) -> None:
        self.rows = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._square, self._error, self._active = 0.0, 0.0, 0
        self._reconstructed = 0

    def add_rows(self, x: Tensor) -> None:
        """Counts [n, D] rows into the mean and the variance."""
        x = x.double()
        self.rows += len(x)
        self._sum += x.sum(0).cpu()
        self._square += float(x.square().sum())

    def add_reconstruction(self, x: Tensor, recon: Tensor, values: Tensor) -> None:
        """Counts the error of [n, D] rows and their [n, K] latent values."""
        self._reconstructed += len(x)
        self._error += float((x.double() - recon.double()).square().sum())
        self._active += int((values > 0).sum())

    @property
    def mean(self) -> Tensor:
        """[D] float64 mean row."""
        return self._sum / max(self.rows, 1)

    @property
    def fvu(self) -> float | None:
        """Fraction of variance unexplained; None for rows without variance."""
        variance = self._square - self.rows * float(self.mean.square().sum())
        return self._error / variance if variance > 0 else None

    @property
    def mse(self) -> float:
        """Mean squared error of an element."""
        return self._error / (max(self._reconstructed, 1) * len(self._sum))

    @property
    def l0(self) -> float:
        """Mean number of latents above 0 in a row."""
        return self._active / max(self._reconstructed, 1)
