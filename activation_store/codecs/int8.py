"""The codec `int8`, which quantises rows to half the size of bfloat16, with one scale per token.

    z[t, c] = (x[t, c] - mean[c]) / std[c]      mean and std come from the store's calibration
    scale[t] = max_c |z[t, c]| / 127
    q[t, c] = round(z[t, c] / scale[t])         q (int8) and scale (float32) are stored
    x[t, c] ~ mean[c] + scale[t] * (std[c] * q[t, c])

Normalising each channel prevents channels that are always large from using up the resolution of the
others. The scale per token adapts to massive activations, so nothing is clipped and the error is at
most std[c] * scale[t] / 2. A row that equals the mean has scale 0. A row with a NaN or infinite
value has scale NaN. It is read back as NaN in every channel, so it cannot be mistaken for a valid
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.codecs.base import SCALE, Codec, DiskArray, Floats, RowCodec, ScaleOffset
from activation_store.format.calibration import Calibration

LARGEST = 127
_BLOCK_VALUES = 1 << 18  # rows are processed in blocks that fit into the CPU cache
_LEAST_STD = 1e-4  # minimum std of a channel, relative to the root mean square of all channels' std


@dataclass(frozen=True)
class Scaling(RowCodec):
    """Per-channel constants of the quantisation formula, for one hookpoint array."""

    mean: Floats
    """Mean of each channel, [d_model]."""
    std: Floats
    """Standard deviation by which each channel is divided, [d_model], above 0."""

    def encode(self, rows: NDArray[Any]) -> tuple[NDArray[np.int8], Floats]:
        """Quantise `rows` [n, d_model] of any float dtype to q [n, d_model] and scale [n]."""
        n, width = rows.shape
        q = np.empty((n, width), np.int8)
        scale = np.empty(n, np.float32)
        step = max(_BLOCK_VALUES // width, 1)
        for start in range(0, n, step):
            part = slice(start, start + step)
            z = (rows[part].astype(np.float32) - self.mean) / self.std
            largest = np.abs(z).max(axis=1, initial=0)
            finite = np.isfinite(largest)
            scale[part] = np.where(finite, largest / np.float32(LARGEST), np.nan)
            # Avoid dividing by a scale of 0 or NaN. The values of such rows do not matter.
            used = np.where(scale[part] > 0, scale[part], np.float32(1))
            z[~finite] = 0
            q[part] = np.clip(np.rint(z / used[:, None]), -LARGEST, LARGEST)
        return q, scale

    def decode(self, stored: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
        """Dequantise q [n, d_model] and scale [n] into `out` [n, d_model] of any float dtype."""
        q, scale = stored
        step = max(_BLOCK_VALUES // max(q.shape[1], 1), 1)
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            rows = q[part] * self.std
            rows *= scale[part, None]
            rows += self.mean
            out[part] = rows

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes that other readers need to decode the Zarr array of q."""
        return {
            "dequantise": "mean[c] + scale[t] * (std[c] * q[t, c])",
            "scale": name + SCALE,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @property
    def scale_offset(self) -> ScaleOffset:
        """Parameters for decoding rows on a device."""
        return ScaleOffset(offset=self.mean, factor=self.std, scale=SCALE)


class Int8(Codec):
    """Codec that stores int8 values and one float32 scale per row."""

    needs_calibration = True

    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        """Return the arrays of q and scale, which do not depend on the dtype of the rows."""
        return {
            "": DiskArray(np.dtype(np.int8), (width,)),
            SCALE: DiskArray(np.dtype("<f4"), ()),
        }

    def row_codec(
        self, dtype: np.dtype[Any], width: int, calibration: Calibration | None
    ) -> Scaling:
        """Return the scaling of a hookpoint array.

        The std of a channel that hardly varied in the sample is raised to a small fraction of the
        typical std. Otherwise, a later value of this channel that deviates from the mean would use
        up the resolution of its whole row.
        """
        assert calibration is not None, "a header with codec int8 has a calibration"
        std = np.abs(np.asarray(calibration.std, np.float64))
        usual = float(np.sqrt(np.mean(std**2)))
        least = _LEAST_STD * usual if usual > 0 else 1.0
        return Scaling(
            np.asarray(calibration.mean, np.float32), np.maximum(std, least).astype(np.float32)
        )


INT8 = Int8()
