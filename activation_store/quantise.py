"""The codec `int8`: half the bytes of bfloat16, every token on its own scale.

    z[t, c] = (x[t, c] - mean[c]) / std[c]      mean and std of the store's calibration
    scale[t] = max_c |z[t, c]| / 127
    q[t, c] = round(z[t, c] / scale[t])         stored: q, int8, and scale, float32
    x[t, c] ~ mean[c] + scale[t] * (std[c] * q[t, c])

The scale of a channel keeps channels that are always large from drowning the others, and that of a
token keeps massive ones: nothing is clipped, and the error is at most std[c] * scale[t] / 2. A row
that equals the mean has scale 0. A row in which any number is NaN or infinite gets a scale that is
NaN, and reads back as NaN in every channel: never as numbers that look sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from activation_store.header import StoreHeader

LARGEST = 127
_BLOCK_VALUES = 1 << 18  # worked on in pieces that stay in the cache
_LEAST_STD = 1e-4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scaling:
    """The channels' part of the formula, for one array."""

    mean: Floats
    """[d_model]."""
    std: Floats
    """[d_model], above 0."""

    def quantise(self, rows: NDArray[Any]) -> tuple[NDArray[np.int8], Floats]:
        """`rows` [n, d_model] of any float type -> q [n, d_model], scale [n]."""
        n, width = rows.shape
        q, scale = np.empty((n, width), np.int8), np.empty(n, np.float32)
        step = max(_BLOCK_VALUES // width, 1)
        for start in range(0, n, step):
            part = slice(start, start + step)
            z = (rows[part].astype(np.float32) - self.mean) / self.std
            largest = np.abs(z).max(axis=1, initial=0)
            finite = np.isfinite(largest)
            scale[part] = np.where(finite, largest / np.float32(LARGEST), np.nan)
            used = np.where(scale[part] > 0, scale[part], np.float32(1))
            z[~finite] = 0
            q[part] = np.clip(np.rint(z / used[:, None]), -LARGEST, LARGEST)
        return q, scale

    def dequantise(self, q: NDArray[np.int8], scale: Floats, out: NDArray[Any]) -> None:
        """Writes the rows of q [n, d_model], scale [n] to `out` [n, d_model], of any float type."""
        step = max(_BLOCK_VALUES // max(q.shape[1], 1), 1)
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            rows = q[part] * self.std
            rows *= scale[part, None]
            rows += self.mean
            out[part] = rows


def scaling(header: StoreHeader, name: str) -> Scaling:
    """Of a hookpoint array, from the calibration in the header.

    A channel that hardly varied in the sample gets a small part of a usual channel's std, lest one
    later value that does differ takes the whole row's resolution.
    """
    assert header.calibration is not None, "a header with codec int8 has a calibration"
    calibration = header.calibration[name]
    std = np.abs(np.asarray(calibration.std, np.float64))
    usual = float(np.sqrt(np.mean(std**2)))
    least = _LEAST_STD * usual if usual > 0 else 1.0
    return Scaling(
        np.asarray(calibration.mean, np.float32), np.maximum(std, least).astype(np.float32)
    )


def attributes(header: StoreHeader, name: str) -> dict[str, Any]:
    """Attributes of the Zarr array of q: all that any reader needs to get the rows back."""
    part = scaling(header, name)
    return {
        "dequantise": "mean[c] + scale[t] * (std[c] * q[t, c])",
        "scale": f"{name}.scale",
        "mean": part.mean.tolist(),
        "std": part.std.tolist(),
    }
