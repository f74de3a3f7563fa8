"""Robust fits of scaling laws, which are sums of exponentials, with bootstrap intervals. No I/O.

Every law has the form L(x) = sum_j exp(features_j(x) . theta_j), where the features are 1, ln n,
ln k and (ln n)(ln k). The unknowns theta are fitted. Each reported coefficient, such as a floor or
an exponent, is a function of one unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import norm, t

Array = NDArray[np.float64]

HUBER_SCALES = 1.345
"""Residual at which Huber's loss becomes linear, in robust standard deviations.

This value makes the fit 95% efficient for Gaussian noise.
"""
LEVEL = 0.95
"""Probability with which an interval contains the true value."""
_SMALLEST_SCALE = 1e-6
"""Lower limit of the scale of log residuals.

Without this limit, Huber's loss would have width 0 on noise-free data.
"""
_FAR = 1e6
"""Limit of the absolute value of an inner unknown (see `_Problem`)."""
_VANISHED = 1e-3
"""A term counts as vanished if its share of the loss does not exceed this value at any point.

Its gradient is then too small for a search to recover the term.
"""
_START_FLOORS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Fractions of the lowest loss that the last term takes at the start of each search."""


@dataclass(frozen=True)
class Coefficient:
    """One reported number of a law: `after(before(unknown))`.

    The interval is computed for `before(unknown)`, which may be any real number. Its ends are then
    mapped by `after`.
    """

    name: str
    before: Callable[[Array], Array] = np.positive
    """Applied to the unknown before its interval is computed."""
    after: Callable[[Array], Array] = np.positive
    """Applied to the value and to the ends of its interval."""


def _not_negative(value: Array) -> Array:
    return np.maximum(value, 0.0)


@dataclass(frozen=True)
class Law:
    """A scaling law.

    Attributes:
        name: Short name for files and headings.
        formula: The law as a readable formula.
        variables: Names of the V columns of x.
        terms: Features of each exponential, as indices into the list of 1, the logarithm of each
            variable, and the product of the two logarithms.
        coefficients: One reported number per unknown, in the order of the terms.
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    terms: tuple[tuple[int, ...], ...]
    coefficients: tuple[Coefficient, ...]

    @property
    def n_unknowns(self) -> int:
        """Number of fitted unknowns, P."""
        return sum(len(term) for term in self.terms)

    def features(self, x: Array) -> list[Array]:
        """Return the features of each term, [N, number of its unknowns].

        Args:
            x: [N, V] positive values of one variable, or of n and k.
        """
        logs = [np.ones(len(x)), *np.log(x).T]
        if len(self.variables) == 2:
            logs.append(logs[1] * logs[2])
        return [np.stack([logs[column] for column in term], axis=1) for term in self.terms]

    def log_loss(self, theta: Array, x: Array) -> Array:
        """Return ln L, [..., N].

        Args:
            theta: [..., P] unknowns.
            x: [N, V] positive values.
        """
        parts = []
        first = 0
        for features in self.features(x):
            last = first + features.shape[1]
            parts.append(theta[..., first:last] @ features.T)
            first = last
        return np.logaddexp.reduce(np.stack(parts), axis=0)


FLOOR_LAW = Law(
    "L(n)",
    "L(n) = e + a n^-b",
    ("n",),
    ((0, 1), (0,)),
    (
        Coefficient("a", after=np.exp),
        Coefficient("b", before=np.negative),
        # The interval is computed for e, not for ln e. If the data does not distinguish e from 0,
        # then ln e has no lower bound.
        Coefficient("e", before=np.exp, after=_not_negative),
    ),
)
COMPUTE_LAW = Law(
    "L(C)",
    "L(C) = e + a C^-b",
    ("C",),
    FLOOR_LAW.terms,
    FLOOR_LAW.coefficients,
)
JOINT_LAW = Law(
    "L(n, k)",
    "L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)",
    ("n", "k"),
    ((0, 2, 1, 3), (0, 2)),
    tuple(map(Coefficient, ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"))),
)
"""Gao et al. 2024 (arXiv 2406.04093), section 3."""
TOKENS_LAW = Law(
    "T(n)",
    "T(n) = t0 n^p",
    ("n",),
    ((0, 1),),
    (Coefficient("t0", after=np.exp), Coefficient("p")),
)


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that contains the true value with probability `LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law and its bootstrap replicates."""

    law: Law
    theta: Array
    """[P] fitted unknowns."""
    replicates: Array
    """[R, P] unknowns fitted to the bootstrap replicates."""
    residuals: Array
    """[N] ln(measured) - ln(fitted)."""
    spare: int
    """Degrees of freedom: independent observations minus unknowns, or number of groups minus 1."""

    @property
    def noise(self) -> Array:
        """[N] residuals, centred on 0 and enlarged to correct for the fitted unknowns."""
        enlarged = self.residuals * np.sqrt(len(self.residuals) / max(self.spare, 1))
        return np.asarray(enlarged - enlarged.mean())

    def coefficients(self) -> dict[str, Interval]:
        """Return each reported coefficient by name, with its interval."""
        found = {}
        for i, coefficient in enumerate(self.law.coefficients):
            value = coefficient.before(self.theta[i])
            low, high = self._ends(value, coefficient.before(self.replicates[:, i]))
            with np.errstate(over="ignore"):  # infinity stands for an unknown end
                ends = coefficient.after(np.array([value, low, high]))
            found[coefficient.name] = Interval(*map(float, ends))
        return found

    def curve(self, x: Array) -> tuple[Array, Array, Array]:
        """Return the fitted law at x [N, V] and the ends of its interval, each [N]."""
        value = self.law.log_loss(self.theta, x)
        low, high = self._ends(value, self.law.log_loss(self.replicates, x))
        with np.errstate(over="ignore"):  # far from the data the interval may be infinite
            return np.exp(value), np.exp(low), np.exp(high)

    def forecast(self, x: Array, rng: np.random.Generator) -> list[Interval]:
        """Forecast the measurement of a new cell at each row of x [N, V].

        The interval covers the uncertainty of the law and the noise of the new cell. The noise is
        drawn from the enlarged residuals of the fitted cells.
        """
        value = self.law.log_loss(self.theta, x)
        spread = self.law.log_loss(self.replicates, x)
        spread = spread + rng.choice(self.noise, size=spread.shape)
        low, high = self._ends(value, spread)
        return [Interval(*map(float, row)) for row in np.exp(np.stack([value, low, high], axis=1))]

    def _ends(self, value: Array | float, spread: Array) -> tuple[Array, Array]:
        """Return the interval's ends: percentiles of `spread` over axis 0, stretched about `value`.

        The stretch is the quantile of Student's t distribution divided by the quantile of the
        normal distribution. Plain percentiles are too narrow by this factor when there are few
        degrees of freedom.
        """
        tail = (1 - LEVEL) / 2
        stretch = t.isf(tail, self.spare) / norm.isf(tail) if self.spare > 0 else np.inf
        low, high = np.quantile(spread - value, (tail, 1 - tail), axis=0)
        # Keep the value inside the interval, even if nearly all replicates are on one side of it.
        return value + stretch * np.minimum(low, 0), value + stretch * np.maximum(high, 0)


def fit(
    law: Law,
    x: Array,
    y: Array,
    n_boot: int,
    rng: np.random.Generator,
    groups: NDArray[np.int64] | None = None,
) -> Fit:
    """Fit a law to measurements with Huber's loss on log residuals, from several start points.

    The bootstrap keeps x and resamples the residuals of the cells. Resampling the cells themselves
    would often leave too few distinct n to fit the law, because there are only a handful of cells.

    Args:
        law: The law to fit.
        x: [N, V] positive values of the variables.
        y: [N] positive measurements.
        n_boot: Number of bootstrap replicates.
        rng: Random generator of the bootstrap.
        groups: [N] group of each observation. Observations in the same group share their noise, so
            the bootstrap multiplies all residuals of a group by the same random weight (wild
            bootstrap). None if all observations are independent.

    Raises:
        ValueError: If there are fewer observations than unknowns.
    """
    if len(y) < law.n_unknowns:
        raise ValueError(
            f"{law.name}: {len(y)} observations for {law.n_unknowns} unknowns; expected at least "
            "as many observations as unknowns"
        )
    log_y = np.log(y)
    problem = _Problem(law, x)
    starts = [problem.inner(start) for start in _starts(law, x, y)]
    middle = starts[len(starts) // 2]
    # First, fit with a loss that is close to the absolute loss. The residuals of this fit give the
    # scale of the noise, which sets the width of Huber's loss for the final fit.
    rough = problem.best(starts, log_y, width=1e-3)
    width = HUBER_SCALES * _scale(log_y - problem.predict(rough), law.n_unknowns)
    best = problem.best([rough, *starts], log_y, width)
    fitted = problem.predict(best)
    n_independent = len(y) if groups is None else len(np.unique(groups))
    # For clustered observations, the degrees of freedom are usually the number of clusters minus 1.
    spare = n_independent - (law.n_unknowns if groups is None else 1)
    centre = Fit(law, problem.outer(best), np.empty((0, law.n_unknowns)), log_y - fitted, spare)
    # Start each replicate at the best fit, unless one of its terms has vanished.
    origin = best if problem.smallest_share(best) > _VANISHED else middle
    replicates = [
        problem.outer(problem.best([origin], fitted + noise, width))
        for noise in _resampled(centre, n_boot, rng, groups)
    ]
    return Fit(law, centre.theta, np.array(replicates), centre.residuals, spare)


def _resampled(
    fitted: Fit, n_boot: int, rng: np.random.Generator, groups: NDArray[np.int64] | None
) -> Array:
    """Draw the noise of the bootstrap replicates, [n_boot, N]."""
    n = len(fitted.residuals)
    if groups is None:
        return rng.choice(fitted.noise, size=(n_boot, n))
    _, member = np.unique(groups, return_inverse=True)
    # Webb's six weights have mean 0 and variance 1. Two weights would give too few different
    # replicates when there are few groups.
    six = np.sqrt([0.5, 1.0, 1.5])
    weights = rng.choice(np.concatenate([six, -six]), size=(n_boot, member.max() + 1))
    return np.asarray(weights[:, member] * fitted.residuals)


def _scale(residuals: Array, n_unknowns: int) -> float:
    """Estimate the standard deviation robustly from the residuals of an absolute-loss fit.

    Such a fit passes through as many points as it has unknowns. The same number of the smallest
    residuals is therefore dropped.
    """
    sizes = np.sort(np.abs(residuals))[n_unknowns:]
    return max(float(np.median(sizes)) * 1.4826, _SMALLEST_SCALE) if len(sizes) else _SMALLEST_SCALE


def _starts(law: Law, x: Array, y: Array) -> list[Array]:
    """Return start points for the search, each a vector of unknowns [P].

    In each start point, the last term takes a fraction of the lowest loss, and the first term is
    fitted to the rest.
    """
    first, *rest = law.features(x)
    if not rest:
        return [np.asarray(np.linalg.lstsq(first, np.log(y), rcond=None)[0], np.float64)]
    (last,) = rest
    # The lowest loss among the cells for which the last term has the same value.
    _, member = np.unique(last.round(9), axis=0, return_inverse=True)
    lowest = np.full(member.max() + 1, np.inf)
    np.minimum.at(lowest, member.ravel(), y)
    starts = []
    for share in _START_FLOORS:
        floor = share * lowest[member.ravel()]
        head = np.linalg.lstsq(first, np.log(y - floor), rcond=None)[0]
        tail = np.linalg.lstsq(last, np.log(floor), rcond=None)[0]
        starts.append(np.concatenate([head, tail]))
    return starts


class _Problem:
    """Least squares for one law at fixed x, in scaled and uncorrelated unknowns.

    ln n and ln k are far from 0, so the columns of the features are nearly parallel. The columns of
    each term are replaced by orthonormal ones (QR). The unknowns for the orthonormal columns are
    called inner, and the unknowns of the law are called outer.
    """

    def __init__(self, law: Law, x: Array) -> None:
        pairs = [np.linalg.qr(features) for features in law.features(x)]
        self._q = [q for q, _ in pairs]
        self._r = [r for _, r in pairs]
        # Slice of each term's unknowns in the vector of all unknowns.
        ends = np.cumsum([q.shape[1] for q in self._q])
        self._parts = [slice(end - q.shape[1], end) for q, end in zip(self._q, ends, strict=True)]

    def inner(self, theta: Array) -> Array:
        """Convert the law's unknowns [P] to inner unknowns [P]."""
        return np.concatenate([r @ theta[p] for r, p in zip(self._r, self._parts, strict=True)])

    def outer(self, inner: Array) -> Array:
        """Convert inner unknowns [P] to the law's unknowns [P]."""
        pairs = zip(self._r, self._parts, strict=True)
        return np.concatenate([np.linalg.solve(r, inner[part]) for r, part in pairs])

    def smallest_share(self, inner: Array) -> float:
        """Return the smallest, over all terms, of a term's largest share of the loss."""
        shares = np.exp(self._logs(inner) - self.predict(inner))
        return float(shares.max(axis=1).min())

    def predict(self, inner: Array) -> Array:
        """Return ln L, [N]."""
        return np.asarray(np.logaddexp.reduce(self._logs(inner), axis=0))

    def best(self, starts: list[Array], log_y: Array, width: float) -> Array:
        """Search from each start and return the inner unknowns with the lowest loss found."""
        # Once a term has vanished, MINPACK may try unknowns that give NaN. It rejects such steps.
        with np.errstate(invalid="ignore"):
            found = [
                least_squares(
                    self._residuals, start, self._jacobian, method="lm", args=(log_y, width)
                )
                for start in starts
            ]
        return np.asarray(min(found, key=lambda result: result.cost).x)

    def _logs(self, inner: Array) -> Array:
        # A floor of 0 corresponds to minus infinity, and sums with infinities give NaN.
        inner = np.clip(inner, -_FAR, _FAR)
        return np.stack([q @ inner[p] for q, p in zip(self._q, self._parts, strict=True)])

    def _residuals(self, inner: Array, log_y: Array, width: float) -> Array:
        """Return [N] residuals for MINPACK, whose squares are twice Huber's loss."""
        raw = log_y - self.predict(inner)
        size = np.abs(raw)
        tail = np.sign(raw) * np.sqrt(np.maximum(2 * width * size - width**2, 0))
        return np.asarray(np.where(size <= width, raw, tail))

    def _jacobian(self, inner: Array, log_y: Array, width: float) -> Array:
        logs = self._logs(inner)
        total = np.logaddexp.reduce(logs, axis=0)
        shares = np.exp(logs - total)
        columns = [share[:, None] * q for share, q in zip(shares, self._q, strict=True)]
        size = np.abs(log_y - total)
        # The maximum keeps the root positive where the loss is quadratic; the slope is 1 there.
        tail = width / np.sqrt(np.maximum(2 * width * size - width**2, width**2))
        slope = np.where(size <= width, 1.0, tail)
        return -slope[:, None] * np.concatenate(columns, axis=1)
