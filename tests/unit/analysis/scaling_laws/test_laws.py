"""Test that fits recover known coefficients and that their intervals have the stated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.scaling_laws.curves import Curve, converged_at, frontier
from analysis.scaling_laws.laws import COMPUTE_LAW, FLOOR_LAW, JOINT_LAW, TOKENS_LAW, Fit, Law, fit
from tests.support.sweep_runs import GPT4

Array = NDArray[np.float64]

SIZES = 2.0 ** np.arange(11, 22, 2)
GRID = np.array([(n, k) for n in SIZES for k in (8, 32, 128, 512)])
FLOOR = np.array([np.log(2.0), -0.3, np.log(0.08)])
"""a = 2, b = 0.3, e = 0.08."""


def measured(
    law: Law, theta: Array, x: Array, noise: float, outliers: int, seed: int
) -> tuple[Array, np.random.Generator]:
    """Return losses with relative noise, `outliers` of them off by 20%, and the generator."""
    rng = np.random.default_rng(seed)
    log_y = law.log_loss(theta, x) + noise * rng.standard_normal(len(x))
    off = rng.choice(len(x), outliers, replace=False)
    log_y[off] += rng.choice([-0.2, 0.2], outliers)
    return np.exp(log_y), rng


def truth(law: Law, theta: Array) -> dict[str, float]:
    pairs = zip(law.coefficients, theta, strict=True)
    return {c.name: float(c.after(c.before(np.asarray(value)))) for c, value in pairs}


def covered(found: Fit, theta: Array) -> dict[str, bool]:
    coefficients = found.coefficients()
    wanted = truth(found.law, theta).items()
    return {name: coefficients[name].low <= v <= coefficients[name].high for name, v in wanted}


@pytest.mark.parametrize(
    ("law", "theta", "x"),
    [
        (JOINT_LAW, GPT4, GRID),
        (FLOOR_LAW, FLOOR, SIZES[:, None]),
        (COMPUTE_LAW, FLOOR, SIZES[:, None] * 1e6),
        (TOKENS_LAW, np.array([3.0, 0.6]), SIZES[:, None]),
    ],
    ids=lambda value: value.name if isinstance(value, Law) else "",
)
def test_exact_data_gives_exact_coefficients(law: Law, theta: Array, x: Array) -> None:
    y, rng = measured(law, theta, x, 0.0, 0, seed=0)
    found = fit(law, x, y, 20, rng).coefficients()
    for name, value in truth(law, theta).items():
        assert found[name].value == pytest.approx(value, rel=1e-3), name


def test_published_coefficients_with_noise_and_outliers() -> None:
    x = np.array([(n, k) for n in 2.0 ** np.arange(11, 22) for k in (8, 16, 32, 64, 128, 256)])
    y, rng = measured(JOINT_LAW, GPT4, x, 0.005, outliers=4, seed=1)
    found = fit(JOINT_LAW, x, y, 300, rng)
    assert all(covered(found, GPT4).values()), found.coefficients()
    # Least squares would follow the outliers, which make up most of the sum of squares.
    assert np.abs(found.law.log_loss(found.theta - GPT4, x)).max() < 1.0
    error = np.abs(JOINT_LAW.log_loss(found.theta, x) - JOINT_LAW.log_loss(GPT4, x))
    assert error.max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "theta", "x", "noise", "outliers"),
    [
        (JOINT_LAW, GPT4, GRID, 0.005, 0),
        (FLOOR_LAW, FLOOR, 2.0 ** np.arange(10, 18, 0.5)[:, None], 0.01, 1),
        (FLOOR_LAW, FLOOR, 2.0 ** np.arange(10, 15)[:, None], 0.003, 0),
    ],
    ids=["joint", "outlier", "five cells"],
)
def test_intervals_cover(law: Law, theta: Array, x: Array, noise: float, outliers: int) -> None:
    """Check coefficients and the forecast of a cell four times as large over 40 data sets."""
    hits: dict[str, list[bool]] = {}
    beyond = x.max(axis=0, keepdims=True) * np.array([4.0, 1.0])[: x.shape[1]]
    for seed in range(40):
        y, rng = measured(law, theta, x, noise, outliers, seed)
        found = fit(law, x, y, 99, rng)
        for name, hit in covered(found, theta).items():
            hits.setdefault(name, []).append(hit)
        new = float(np.exp(law.log_loss(theta, beyond)[0] + noise * rng.standard_normal()))
        (forecast,) = found.forecast(beyond, rng)
        hits.setdefault("forecast", []).append(forecast.low <= new <= forecast.high)
    rates = {name: float(np.mean(values)) for name, values in hits.items()}
    assert min(rates.values()) >= 0.85, rates


def test_an_absent_floor_has_an_interval_above_zero() -> None:
    """Fit a pure power law: e is 0, but the upper end of its interval is positive."""
    x: Array = 2.0 ** np.arange(10.0, 18.0)[:, None]
    y, rng = measured(FLOOR_LAW, np.array([0.0, -0.2, -60.0]), x, 0.01, 0, seed=4)
    floor = fit(FLOOR_LAW, x, y, 100, rng).coefficients()["e"]
    assert floor.value < 1e-9 and floor.low == 0.0
    assert 0.005 < floor.high < y.min()


def test_noise_of_groups_widens_the_interval() -> None:
    """Ten points of one run are not ten independent runs."""
    x = 2.0 ** np.linspace(10, 18, 40)[:, None]
    groups = np.repeat(np.arange(4), 10)
    rng = np.random.default_rng(0)
    log_y = FLOOR_LAW.log_loss(FLOOR, x) + 0.01 * rng.standard_normal(4)[groups]
    widths = []
    for given in (None, groups):
        found = fit(FLOOR_LAW, x, np.exp(log_y), 150, np.random.default_rng(1), given)
        b = found.coefficients()["b"]
        widths.append(b.high - b.low)
    assert widths[1] > 1.5 * widths[0]


def test_too_few_observations() -> None:
    with pytest.raises(ValueError, match="2 observations for 3 unknowns"):
        fit(FLOOR_LAW, np.array([[1.0], [2.0]]), np.ones(2), 10, np.random.default_rng(0))


def falling(settles: float, noise: float = 0.0, length: int = 400) -> Curve:
    x = np.arange(1.0, length + 1)
    drawn = np.random.default_rng(0).standard_normal(length)
    return Curve(x, (1 + np.exp(-x / settles)) * np.exp(noise * drawn))


def test_convergence_is_where_the_curve_comes_within_a_hundredth() -> None:
    settles = 20.0
    exact = settles * np.log(100)
    assert converged_at(falling(settles)) == pytest.approx(exact, rel=0.05)
    assert converged_at(falling(settles, noise=0.005)) == pytest.approx(exact, rel=0.25)


def test_a_curve_that_still_falls_has_not_converged() -> None:
    x = np.arange(1.0, 401)
    assert converged_at(Curve(x, x**-0.5)) is None
    assert converged_at(Curve(x[:0], x[:0])) is None


def test_the_final_level_is_the_mean_of_the_last_twentieth() -> None:
    x = np.arange(1.0, 101)
    assert Curve(x, x).smooth().y[-1] == np.mean([96, 97, 98, 99, 100])
    assert Curve(x[:1], x[:1]).smooth().y.tolist() == [1.0]


def test_frontier_is_the_lowest_edge_and_falls() -> None:
    small = Curve(np.array([1.0, 10.0]), np.array([2.0, 1.0]))
    large = Curve(np.array([5.0, 100.0]), np.array([3.0, 0.5]))
    poor = Curve(np.array([1.0, 1000.0]), np.array([4.0, 4.0]))
    edge, owner = frontier([small, large, poor])
    assert set(owner) == {0, 1}
    assert np.all(np.diff(edge.y) < 0)
    assert edge.y[0] == 2.0 and edge.x[0] == 1.0
    assert edge.x[-1] <= 100.0 * (1 + 1e-9)
