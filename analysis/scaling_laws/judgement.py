"""State the reasons not to rely on a fitted law: few points, misfit, wide intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.scaling_laws.laws import COMPUTE_LAW, JOINT_LAW
from analysis.scaling_laws.study import Result

Array = NDArray[np.float64]

FEW_SPARE = 2
"""Degrees of freedom up to which a law is little more than a curve through its points."""
LARGE_RESIDUAL = 0.05
"""Spread of the log residuals above which their order is examined. Below it, a law may be used
even if it is not quite the right one."""
ORDERED = 0.5
"""Correlation between neighbouring residuals from which residuals count as ordered."""
_FEWEST_ORDERED = 5
"""Smallest number of points whose order is meaningful."""
_EXPONENTS = ("b", "p", "beta_n")
"""Coefficients that say how fast the loss, or the number of tokens, changes with n or C."""


def objections(result: Result) -> list[str]:
    """Return one sentence for each reason not to rely on the law; none if there is no reason."""
    found = [_few_points(result), _misfit(result), *_wide_intervals(result), *_forecasts(result)]
    return [sentence for sentence in found if sentence is not None]


def verdict(result: Result) -> str:
    """Return the objections in one line, or how well the law fits."""
    reasons = objections(result)
    if reasons:
        return f"indicative only: {'; '.join(reasons)}"
    rms = float(np.sqrt((result.fit.residuals**2).mean()))
    return f"{len(result.y)} points, {result.law.n_unknowns} coefficients, {rms:.1%} rms residual"


def _few_points(result: Result) -> str | None:
    spare = result.fit.spare
    if spare > FEW_SPARE:
        return None
    if result.law is COMPUTE_LAW:
        return f"only {spare + 1} cells lie on the frontier; train more sizes"
    return (
        f"{len(result.y)} cells for {result.law.n_unknowns} coefficients leave {spare} to test the "
        "law with; train more sizes"
    )


def _misfit(result: Result) -> str | None:
    """Judge the residuals in the order of n or C, within each k."""
    residuals = result.fit.residuals
    low, high = np.expm1(residuals.min()), np.expm1(residuals.max())
    if high - low < LARGE_RESIDUAL or len(residuals) < _FEWEST_ORDERED:
        return None
    if _correlation_of_neighbours(result) < ORDERED:
        return None
    variable = result.law.variables[0]
    return (
        f"residuals from {high:+.0%} to {low:+.0%} are ordered by {variable} instead of scattered: "
        "the law does not describe these points"
    )


def _correlation_of_neighbours(result: Result) -> float:
    """Return the correlation of each residual with that of the next larger n or C, at most 1."""
    residuals = result.fit.residuals - result.fit.residuals.mean()
    order = np.lexsort(result.x.T)  # by k, if there is one, and then by n
    ordered, x = residuals[order], result.x[order]
    same = np.all(x[1:, 1:] == x[:-1, 1:], axis=1)
    products = (ordered[1:] * ordered[:-1])[same]
    if len(products) == 0:
        return 0.0
    return float(products.mean() / np.square(ordered).mean())


def _wide_intervals(result: Result) -> list[str]:
    found = []
    for name, interval in result.fit.coefficients().items():
        # The coefficients of the joint law other than beta_n have no meaning on their own.
        if name in _EXPONENTS and interval.low <= 0 <= interval.high:
            found.append(f"{name} cannot be distinguished from 0")
        elif name in _EXPONENTS and interval.high - interval.low > abs(interval.value):
            found.append(f"{name} lies anywhere between {interval.low:.2g} and {interval.high:.2g}")
        elif name == "e" and interval.low <= 0 and result.law is not JOINT_LAW:
            found.append("the floor e cannot be distinguished from 0, so do not extrapolate far")
    return found


def _forecasts(result: Result) -> list[str]:
    missed = [
        cell
        for cell in result.held_out
        if not cell.forecast.low <= cell.measured <= cell.forecast.high
    ]
    return [
        f"the forecast of {cell.name} from the smaller cells misses by {abs(cell.error):.1%}, more "
        "than its interval allows"
        for cell in missed
    ]
