"""Analyse training curves: smoothing, convergence and the compute frontier. No I/O here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOW = 0.05
"""Length of the averaging window, as a fraction of the curve's tokens."""
TOLERANCE = 0.01
"""A loss has converged once it is within this fraction of the final loss."""
SETTLED = 0.8
"""A curve that converges after this fraction of its tokens is treated as still falling."""
FRONTIER_POINTS = 60
"""Number of compute values at which the frontier is evaluated."""


@dataclass(frozen=True)
class Curve:
    """A measured quantity as a function of training tokens or compute."""

    x: Array
    """[T] float64 tokens or FLOPs, ascending."""
    y: Array
    """[T] float64 measured values."""

    def between(self, low: float, high: float) -> Curve:
        """Return the part with low <= x <= high."""
        inside = (self.x >= low) & (self.x <= high)
        return Curve(self.x[inside], self.y[inside])

    def smooth(self) -> Curve:
        """Average over a trailing window of `WINDOW` times the curve's length.

        Each point is the mean x and mean y of its window. Points whose window starts before the
        first row are left out. The last value is the final level of the curve.
        """
        if not len(self.x):
            return self
        # The window of each row is [first, last), where last includes the row itself.
        first = np.searchsorted(self.x, self.x - WINDOW * self.x[-1], side="right")
        last = np.arange(1, len(self.x) + 1)
        means = [_sums(v, first, last) / (last - first) for v in (self.x, self.y)]
        # A curve that is shorter than a window keeps its last point.
        whole = self.x >= min(self.x[0] + WINDOW * self.x[-1], self.x[-1])
        return Curve(means[0][whole], means[1][whole])


def _sums(values: Array, first: NDArray[np.intp], last: NDArray[np.intp]) -> Array:
    """Return the sum of `values[first:last]` for each pair of indices."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(total[last] - total[first])


def converged_at(curve: Curve) -> float | None:
    """Return the token count at which the smoothed curve first is within `TOLERANCE` of its end.

    Args:
        curve: The part of the curve at the constant learning rate. During the decay of the learning
            rate the loss drops, which would look like late convergence.

    Returns:
        The token count, or None if it cannot be determined. That is the case if the curve converges
        within its first window, where the exact point is unknown, or only in its last part (see
        `SETTLED`), where it may still be falling.
    """
    smooth = curve.smooth()
    if not len(smooth.x):
        return None
    first = int(np.argmax(smooth.y <= (1 + TOLERANCE) * smooth.y[-1]))
    # `first` is the index of the first smoothed value within the tolerance.
    reached = float(smooth.x[first])
    return reached if first > 0 and reached <= SETTLED * curve.x[-1] else None


def frontier(curves: Sequence[Curve]) -> tuple[Curve, NDArray[np.int64]]:
    """Return the lower envelope of loss over compute, at points evenly spaced in ln C.

    A point is kept only if it is lower than all points before it. At the highest compute values
    only large cells have data, and these may be worse than a smaller cell that ended earlier.

    Args:
        curves: Smoothed loss over FLOPs, one curve per cell; at least one must not be empty.

    Returns:
        The envelope, and for each of its points the index of the curve that it lies on.
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
    """Interpolate a curve in ln x at the grid points; infinity beyond the ends of the curve."""
    if not len(curve.x):
        return np.full(len(grid), np.inf)
    logs = np.log(curve.x)
    found = np.interp(np.log(grid), logs, curve.y)
    # Up to rounding, the grid starts and ends at an end of some curve. Allow for the rounding.
    inside = (np.log(grid) >= logs[0] - 1e-9) & (np.log(grid) <= logs[-1] + 1e-9)
    return np.asarray(np.where(inside, found, np.inf))
