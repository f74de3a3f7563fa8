"""What training curves tell: the final level, when it was reached, the compute frontier. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOW = 0.05
"""Of a curve's tokens: how much is averaged."""
TOLERANCE = 0.01
"""A loss within this share of the final one has converged."""
SETTLED = 0.8
"""A curve that converges in the last fifth of its tokens is taken to be falling still."""
FRONTIER_POINTS = 60


@dataclass(frozen=True)
class Curve:
    """A measured quantity over training tokens (or over compute), in order."""

    x: Array
    """[T]."""
    y: Array
    """[T]."""

    def between(self, low: float, high: float) -> Curve:
        """The part with low <= x <= high."""
        inside = (self.x >= low) & (self.x <= high)
        return Curve(self.x[inside], self.y[inside])

    def smooth(self) -> Curve:
        """Means of all rows within the last `WINDOW` of the curve's length, at their mean x.

        Rows before the first whole window are left out. The last value is the final level.
        """
        if not len(self.x):
            return self
        first = np.searchsorted(self.x, self.x - WINDOW * self.x[-1], side="right")
        last = np.arange(1, len(self.x) + 1)
        means = [_sums(v, first, last) / (last - first) for v in (self.x, self.y)]
        whole = self.x >= min(self.x[0] + WINDOW * self.x[-1], self.x[-1])
        return Curve(means[0][whole], means[1][whole])


def _sums(values: Array, first: NDArray[np.intp], last: NDArray[np.intp]) -> Array:
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(total[last] - total[first])


def converged_at(curve: Curve) -> float | None:
    """Tokens at which the smoothed curve first comes within `TOLERANCE` of its final level.

    Args:
        curve: the stretch at the constant learning rate: a decay would look like a late descent.

    Returns:
        None when that happens in the first window, which tells no time, or only in the last part of
        the curve (see `SETTLED`), as then it falls still and the final level is none.
    """
    smooth = curve.smooth()
    if not len(smooth.x):
        return None
    first = int(np.argmax(smooth.y <= (1 + TOLERANCE) * smooth.y[-1]))
    reached = float(smooth.x[first])
    return reached if first > 0 and reached <= SETTLED * curve.x[-1] else None


def frontier(curves: Sequence[Curve]) -> tuple[Curve, NDArray[np.int64]]:
    """The lower envelope of loss over compute, at points evenly spaced in ln C.

    A point counts only where it is lower than all before it: where only large cells reach, they
    may be worse than a smaller one that ended earlier.

    Args:
        curves: smoothed loss over FLOPs, one for each cell; not all of them empty.

    Returns:
        The envelope, and the number of the curve that each of its points lies on.
    """
    ends = [(curve.x[0], curve.x[-1]) for curve in curves if len(curve.x)]
    grid = np.geomspace(min(a for a, _ in ends), max(b for _, b in ends), FRONTIER_POINTS)
    losses = np.stack([_at(curve, grid) for curve in curves])
    owner = losses.argmin(axis=0)
    lowest = losses.min(axis=0)
    before = np.concatenate([[np.inf], np.minimum.accumulate(lowest)[:-1]])
    kept = lowest < before
    return Curve(grid[kept], lowest[kept]), owner[kept].astype(np.int64)


def _at(curve: Curve, grid: Array) -> Array:
    """Interpolated in ln x; infinite outside the curve."""
    if not len(curve.x):
        return np.full(len(grid), np.inf)
    logs = np.log(curve.x)
    # The grid's ends are a curve's ends but for rounding.
    found = np.interp(np.log(grid), logs, curve.y)
    inside = (np.log(grid) >= logs[0] - 1e-9) & (np.log(grid) <= logs[-1] + 1e-9)
    return np.asarray(np.where(inside, found, np.inf))
