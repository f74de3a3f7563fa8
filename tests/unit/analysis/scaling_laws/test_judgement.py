"""Test the words about how far a fitted law can be relied on."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.scaling_laws.judgement import objections, verdict
from analysis.scaling_laws.laws import COMPUTE_LAW, FLOOR_LAW, Interval, Law, fit
from analysis.scaling_laws.study import HeldOut, Result

Array = NDArray[np.float64]
N = np.geomspace(256, 65536, 9)
LOSS = 0.05 + 2.0 * N**-0.35


def result(
    x: Array, y: Array, law: Law = FLOOR_LAW, groups: NDArray[np.int64] | None = None
) -> Result:
    found = fit(law, x[:, None], y, 200, np.random.default_rng(0), groups)
    return Result(law, 32, tuple(f"n{n:.0f}" for n in x), x[:, None], y, found)


def noise(size: float, n: int) -> Array:
    return np.asarray(np.exp(size * np.random.default_rng(1).standard_normal(n)))


def test_a_good_fit_is_not_objected_to() -> None:
    good = result(N, LOSS * noise(0.002, len(N)))
    assert objections(good) == []
    assert verdict(good).startswith("9 points, 3 coefficients, 0.") and "rms" in verdict(good)


def test_four_points_for_three_coefficients() -> None:
    few = result(N[::2][:4], LOSS[::2][:4] * noise(0.002, 4))
    assert "4 cells for 3 coefficients leave 1 to test the law with" in verdict(few)
    assert verdict(few).startswith("indicative only: ")


def test_residuals_in_order_are_a_misfit_and_scattered_ones_are_not() -> None:
    # The steep beginning of a curve over compute, which a power law with a floor does not have.
    x = np.geomspace(1e12, 1e15, 24)
    y = 0.2 + 0.3 * np.exp(-((np.log10(x) - 12) ** 2)) + 0.05 * (np.log10(x) > 14.5)
    groups = np.repeat(np.arange(6), 4)
    (misfit,) = [s for s in objections(result(x, y, COMPUTE_LAW, groups)) if "residuals" in s]
    assert "are ordered by C instead of scattered: the law does not describe these" in misfit
    scattered = result(x, (0.2 + 5e3 * x**-0.4) * noise(0.04, 24), COMPUTE_LAW, groups)
    assert not [s for s in objections(scattered) if "residuals" in s]


def test_wide_intervals() -> None:
    flat = result(N, 0.3 * noise(0.05, len(N)))
    assert any(
        "cannot be distinguished from 0" in s or "anywhere between" in s for s in objections(flat)
    )
    # A pure power law: its floor is 0.
    power = result(N, 2.0 * N**-0.35 * noise(0.01, len(N)))
    assert "the floor e cannot be distinguished from 0" in verdict(power)


@pytest.mark.parametrize(("measured", "said"), [(0.2, True), (0.11, False)])
def test_a_missed_forecast(measured: float, said: bool) -> None:
    good = result(N, LOSS * noise(0.002, len(N)))
    cell = HeldOut("n65536", measured, Interval(0.1, 0.09, 0.12))
    checked = Result(good.law, good.k, good.names, good.x, good.y, good.fit, (cell,))
    text = "the forecast of n65536 from the smaller cells misses by 50.0%"
    assert (text in verdict(checked)) is said
