"""Statistics of a hookpoint's activations, measured on a sample before harvesting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """Statistics of one hookpoint's activations, measured on a sample before harvesting."""

    mean: NDArray[np.float64]
    """Mean of each channel, [d_model]."""
    std: NDArray[np.float64]
    """Standard deviation of each channel, [d_model]."""
    norm: float
    """Norm of the activations, as defined by the harvester. This package stores but never uses
    it."""

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON numbers and lists."""
        mean = np.asarray(self.mean, np.float64).tolist()
        std = np.asarray(self.std, np.float64).tolist()
        return {"mean": mean, "std": std, "norm": float(self.norm)}

    def check(self, key: str, width: int) -> None:
        """Check all values.

        Args:
            key: Name of the calibration, for error messages.
            width: d_model of the hookpoint.

        Raises:
            ConfigError: If `mean` or `std` is not `width` finite numbers, or `norm` is not finite.
        """
        for column in ("mean", "std"):
            values = np.asarray(getattr(self, column), np.float64)
            if values.shape != (width,) or not np.isfinite(values).all():
                raise ConfigError(f"{key}.{column}", values, f"a list of {width} finite numbers")
        if not math.isfinite(self.norm):
            raise ConfigError(f"{key}.norm", self.norm, "a finite number")
