"""Fit the scaling laws that a sweep's cells allow and check them on held-out cells. No I/O here."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.errors import FitError
from analysis.scaling_laws.cells import Cell, Sweep, best_of_each
from analysis.scaling_laws.curves import Curve, converged_at, frontier
from analysis.scaling_laws.laws import (
    COMPUTE_LAW,
    FLOOR_LAW,
    JOINT_LAW,
    TOKENS_LAW,
    Fit,
    Interval,
    Law,
    fit,
)

Array = NDArray[np.float64]

MIN_CELLS = {FLOOR_LAW.name: 4, JOINT_LAW.name: 8, TOKENS_LAW.name: 3, COMPUTE_LAW.name: 4}
"""Law name -> minimum number of cells, which exceeds the law's number of coefficients."""
MIN_SIZES = 3
"""Minimum number of distinct n for every law, of distinct k for L(n, k), and of cells on the
frontier for L(C)."""


@dataclass(frozen=True)
class HeldOut:
    """A cell of the largest n, forecast by a fit to the smaller cells."""

    name: str
    measured: float
    forecast: Interval

    @property
    def error(self) -> float:
        """Relative error of the forecast: forecast / measured - 1."""
        return self.forecast.value / self.measured - 1


@dataclass(frozen=True)
class Result:
    """One law, fitted to one set of points."""

    law: Law
    k: int | None
    """The k that all cells share; None for the joint law L(n, k)."""
    names: tuple[str, ...]
    """[N] name of the cell that each point comes from."""
    x: Array
    """[N, V] float64 variables of the law."""
    y: Array
    """[N] float64 measured values."""
    fit: Fit
    held_out: tuple[HeldOut, ...] = ()
    not_held_out: str | None = None
    """Reason why no cell was held out; None for L(C) and T(n), which are never checked this way."""
    curves: tuple[tuple[str, Curve], ...] = ()
    """For L(C): (cell, smoothed curve) of all cells; their lower envelope is the frontier."""

    @property
    def title(self) -> str:
        """Name of the law, with the k of its cells: `L(n) at k = 32`."""
        return self.law.name if self.k is None else f"{self.law.name} at k = {self.k}"


@dataclass(frozen=True)
class Study:
    """All results for one sweep."""

    metric: str
    sweep: Sweep
    cells: tuple[Cell, ...]
    """Cells to which L(n) and L(n, k) were fitted: the best cell of each n, k and seed."""
    worse: dict[str, str]
    """Name of each other finished cell -> reason why it was not used."""
    tokens_to_convergence: dict[str, float | None]
    """Cell name -> tokens to convergence; None if the curve does not determine them."""
    results: tuple[Result, ...]
    not_fitted: dict[str, str]
    """Title of each law that was not fitted -> reason."""


class _TooFew(Exception):
    """The reason why a law cannot be fitted to these cells; caught within this module."""


def study_sweep(sweep: Sweep, metric: str, hold_out: str, n_boot: int, seed: int) -> Study:
    """Fit every law that the cells allow.

    Args:
        sweep: The cells of the sweep.
        metric: `fvu`, `loss` or `heldout_fvu`.
        hold_out: `largest` to fit again without the cells of the largest n and forecast them, or
            `none`.
        n_boot: Number of bootstrap replicates for each fit.
        seed: Seed of the bootstrap.

    Raises:
        FitError: If no law can be fitted to the cells.
    """
    cells, worse = best_of_each(sweep.cells, metric)
    converged = {cell.name: converged_at(cell.steady(metric)) for cell in sweep.cells}
    fitter = _Fitter(metric, hold_out == "largest", n_boot, seed)
    plans: list[tuple[Law, int | None, list[Cell]]] = [(JOINT_LAW, None, cells)]
    for each_k in sorted({cell.k for cell in cells}):
        same_k = [cell for cell in cells if cell.k == each_k]
        plans += [(law, each_k, same_k) for law in (FLOOR_LAW, COMPUTE_LAW, TOKENS_LAW)]
    results, not_fitted = [], {}
    for law, k, group in plans:
        try:
            # L(C) uses all cells of this k, the other laws only the best cell of each n and seed.
            if law is COMPUTE_LAW:
                every = [cell for cell in sweep.cells if cell.k == k]
                results.append(fitter.compute(every, k))
            elif law is TOKENS_LAW:
                results.append(fitter.tokens(group, k, converged))
            else:
                results.append(fitter.levels(law, group, k))
        except _TooFew as reason:
            title = law.name if k is None else f"{law.name} at k = {k}"
            not_fitted[title] = str(reason)
    if not results:
        raise FitError(_nothing(sweep, not_fitted))
    return Study(metric, sweep, tuple(cells), worse, converged, tuple(results), not_fitted)


def _nothing(sweep: Sweep, not_fitted: dict[str, str]) -> str:
    reasons = [f"{title}: {reason}" for title, reason in not_fitted.items()]
    reasons += [f"{name}: {reason}" for name, reason in sweep.left_out.items()]
    return (
        f"{sweep.folder}: no scaling law can be fitted to the {len(sweep.cells)} finished cells: "
        f"{'; '.join(reasons)}; train more dictionary sizes at one k"
    )


@dataclass(frozen=True)
class _Fitter:
    """Fits one law at a time; every method raises `_TooFew` if the cells do not allow the law."""

    metric: str
    hold_out: bool
    n_boot: int
    seed: int

    def levels(self, law: Law, cells: Sequence[Cell], k: int | None) -> Result:
        """Fit L(n) or L(n, k) to the final values of the cells."""
        _require(law, cells)
        x, y = _points(law, cells, self.metric)
        held_out, reason = self._held_out(law, cells, k)
        names = tuple(cell.name for cell in cells)
        return Result(law, k, names, x, y, self._fit(law, k, x, y), held_out, reason)

    def tokens(
        self, cells: Sequence[Cell], k: int | None, converged: dict[str, float | None]
    ) -> Result:
        """Fit T(n) to the number of tokens after which each cell's loss had converged."""
        reached = [(cell, converged[cell.name]) for cell in cells]
        known = [(cell, tokens) for cell, tokens in reached if tokens is not None]
        if len(known) < len(cells) and len(known) < MIN_CELLS[TOKENS_LAW.name]:
            raise _TooFew(
                f"convergence was measured for only {len(known)} of {len(cells)} cells: the "
                "loss must converge after the first 5% and within the first 80% of the tokens at "
                "the constant learning rate"
            )
        _require(TOKENS_LAW, [cell for cell, _ in known])
        x = np.array([[cell.n_latents] for cell, _ in known], np.float64)
        y = np.array([tokens for _, tokens in known], np.float64)
        names = tuple(cell.name for cell, _ in known)
        return Result(TOKENS_LAW, k, names, x, y, self._fit(TOKENS_LAW, k, x, y))

    def compute(self, cells: Sequence[Cell], k: int | None) -> Result:
        """Fit L(C) to the lower envelope of the cells' curves over training compute."""
        unknown = [cell.name for cell in cells if cell.d_model is None]
        if unknown:
            raise _TooFew(
                f"{unknown[0]} has no readable checkpoint, so its d_model and its compute are "
                "unknown"
            )
        _require(COMPUTE_LAW, cells)
        curves = [cell.over_compute(self.metric) for cell in cells]
        if not any(len(curve.x) for curve in curves):
            raise _TooFew(
                "no cell has logged rows after its warm-up and the first tenth of its tokens"
            )
        envelope, owner = frontier(curves)
        on_it = len(np.unique(owner))
        if on_it < MIN_SIZES:
            raise _TooFew(f"{on_it} cells lie on the frontier, expected at least {MIN_SIZES}")
        x = envelope.x[:, None]
        # Points from the same cell share its noise, so they are resampled as one group.
        found = self._fit(COMPUTE_LAW, k, x, envelope.y, groups=owner)
        names = tuple(cells[i].name for i in owner)
        shown = tuple((cell.name, curve) for cell, curve in zip(cells, curves, strict=True))
        return Result(COMPUTE_LAW, k, names, x, envelope.y, found, curves=shown)

    def _held_out(
        self, law: Law, cells: Sequence[Cell], k: int | None
    ) -> tuple[tuple[HeldOut, ...], str | None]:
        if not self.hold_out:
            return (), "fit.hold_out=none"
        largest = max(cell.n_latents for cell in cells)
        smaller = [cell for cell in cells if cell.n_latents < largest]
        kept_out = [cell for cell in cells if cell.n_latents == largest]
        try:
            _require(law, smaller)
        except _TooFew as reason:
            return (), f"without the largest n, {largest}: {reason}"
        found = self._fit(law, k, *_points(law, smaller, self.metric))
        x, y = _points(law, kept_out, self.metric)
        forecasts = found.forecast(x, self._rng(law, k))
        rows = zip(kept_out, y, forecasts, strict=True)
        return tuple(HeldOut(cell.name, float(value), f) for cell, value, f in rows), None

    def _fit(
        self,
        law: Law,
        k: int | None,
        x: Array,
        y: Array,
        groups: NDArray[np.int64] | None = None,
    ) -> Fit:
        return fit(law, x, y, self.n_boot, self._rng(law, k), groups)

    def _rng(self, law: Law, k: int | None) -> np.random.Generator:
        """Return a generator for one law.

        Each law has its own generator, so that its interval does not depend on which other laws are
        fitted.
        """
        return np.random.default_rng((self.seed, zlib.crc32(law.name.encode()), k or 0))


def _points(law: Law, cells: Sequence[Cell], metric: str) -> tuple[Array, Array]:
    rows = [(cell.n_latents, cell.k)[: len(law.variables)] for cell in cells]
    return np.array(rows, np.float64), np.array([cell.level(metric) for cell in cells])


def _require(law: Law, cells: Sequence[Cell]) -> None:
    """Check that there are enough cells, n and k to fit the law.

    Raises:
        _TooFew: If there are too few; the message says what is missing.
    """
    sizes = {cell.n_latents for cell in cells}
    ks = {cell.k for cell in cells}
    # For a law of one variable, cells that differ only in their seed count as separate points. The
    # joint law requires distinct points of the (n, k) grid.
    grid = {(cell.n_latents, cell.k) for cell in cells}
    n_cells = len(grid) if law is JOINT_LAW else len(cells)
    least = MIN_CELLS[law.name]
    if n_cells < least:
        raise _TooFew(f"{n_cells} usable cells, expected at least {least}")
    if len(sizes) < MIN_SIZES:
        raise _TooFew(f"found {len(sizes)} distinct values of n, expected at least {MIN_SIZES}")
    if law is JOINT_LAW and len(ks) < MIN_SIZES:
        raise _TooFew(f"found {len(ks)} distinct values of k, expected at least {MIN_SIZES}")
