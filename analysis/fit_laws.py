"""Scaling laws as sums of exponentials, fitted robustly, with bootstrap intervals. No I/O here.

Every law is L(x) = sum_j exp(features_j(x) . theta_j), where the features are 1, ln n, ln k and
their product. The unknowns theta are what is fitted; what people read (a floor, an exponent) is a
function of one of them each.
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
"""Where Huber's loss turns linear, in residual scales: 95% efficient for Gaussian noise."""
LEVEL = 0.95
_SMALLEST_SCALE = 1e-6
"""Of log residuals. Data without noise would otherwise have a Huber loss of width 0."""
_FAR = 1e6
_VANISHED = 1e-3
"""A term that nowhere takes a larger share leaves no slope for a search to find it again by."""
_START_FLOORS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Shares of the lowest loss that the last term takes where the searches begin."""


@dataclass(frozen=True)
class Coefficient:
    """One number of a law, as people read it: `after(before(unknown))`.

    In between it may be any real number, and that is where its interval is made.
    """

    name: str
    before: Callable[[Array], Array] = np.positive
    after: Callable[[Array], Array] = np.positive


def _not_negative(value: Array) -> Array:
    return np.maximum(value, 0.0)


@dataclass(frozen=True)
class Law:
    """A scaling law.

    Attributes:
        name: short, for files and headings.
        formula: as people write it.
        variables: names of the columns of x.
        terms: for every exponential, the columns of its features in `Law.features`.
        coefficients: one for every unknown, in the order of the terms.
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    terms: tuple[tuple[int, ...], ...]
    coefficients: tuple[Coefficient, ...]

    @property
    def n_unknowns(self) -> int:
        """How many numbers are fitted."""
        return sum(len(term) for term in self.terms)

    def features(self, x: Array) -> list[Array]:
        """Of every term, [N, its unknowns].

        Args:
            x: [N, V] positive values: one variable, or n and k.
        """
        logs = [np.ones(len(x)), *np.log(x).T]
        if len(self.variables) == 2:
            logs.append(logs[1] * logs[2])
        return [np.stack([logs[column] for column in term], axis=1) for term in self.terms]

    def log_loss(self, theta: Array, x: Array) -> Array:
        """ln L, [..., N].

        Args:
            theta: [..., P] unknowns.
            x: [N, V].
        """
        parts, first = [], 0
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
        # Not as a logarithm: a floor that cannot be told from 0 has one of minus anything.
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
    """A value and the interval that holds the truth with probability `LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law and its bootstrap replicates."""

    law: Law
    theta: Array
    """[P] unknowns."""
    replicates: Array
    """[R, P] unknowns of the bootstrap's fits."""
    residuals: Array
    """[N] ln(measured) - ln(fitted)."""
    spare: int
    """Independent observations above the number of unknowns."""

    @property
    def noise(self) -> Array:
        """[N] residuals, enlarged by what the fit took out of them, around 0."""
        enlarged = self.residuals * np.sqrt(len(self.residuals) / max(self.spare, 1))
        return np.asarray(enlarged - enlarged.mean())

    def coefficients(self) -> dict[str, Interval]:
        """What people read, by name."""
        found = {}
        for i, coefficient in enumerate(self.law.coefficients):
            value = coefficient.before(self.theta[i])
            low, high = self._ends(value, coefficient.before(self.replicates[:, i]))
            with np.errstate(over="ignore"):  # nothing is known of it, and infinity says so
                ends = coefficient.after(np.array([value, low, high]))
            found[coefficient.name] = Interval(*map(float, ends))
        return found

    def curve(self, x: Array) -> tuple[Array, Array, Array]:
        """(fitted, low, high) of the law itself at x [N, V], each [N]."""
        value = self.law.log_loss(self.theta, x)
        low, high = self._ends(value, self.law.log_loss(self.replicates, x))
        with np.errstate(over="ignore"):  # far from the data, where nothing is known
            return np.exp(value), np.exp(low), np.exp(high)

    def forecast(self, x: Array, rng: np.random.Generator) -> list[Interval]:
        """What a new cell at each row of x [N, V] will measure: the law's interval and the noise's.

        The noise of a new cell is drawn from the enlarged residuals of the fitted ones.
        """
        value = self.law.log_loss(self.theta, x)
        spread = self.law.log_loss(self.replicates, x)
        spread = spread + rng.choice(self.noise, size=spread.shape)
        low, high = self._ends(value, spread)
        return [Interval(*map(float, row)) for row in np.exp(np.stack([value, low, high], axis=1))]

    def _ends(self, value: Array | float, spread: Array) -> tuple[Array, Array]:
        """Percentiles over axis 0, stretched around the value by Student's t over the normal's z.

        Plain percentiles are too narrow by that factor when few observations are spare.
        """
        tail = (1 - LEVEL) / 2
        stretch = t.isf(tail, self.spare) / norm.isf(tail) if self.spare > 0 else np.inf
        low, high = np.quantile(spread - value, (tail, 1 - tail), axis=0)
        # The value lies within, even where nearly all replicates are on one side of it.
        return value + stretch * np.minimum(low, 0), value + stretch * np.maximum(high, 0)


def fit(
    law: Law,
    x: Array,
    y: Array,
    n_boot: int,
    rng: np.random.Generator,
    groups: NDArray[np.int64] | None = None,
) -> Fit:
    """Fits a law to measurements by Huber's loss on log residuals, from several starts.

    The bootstrap keeps x and resamples the cells' residuals: with a handful of cells, resampling
    the cells themselves would often leave too few different n to fit anything.

    Args:
        law: to be fitted.
        x: [N, V] positive.
        y: [N] positive.
        n_boot: bootstrap replicates.
        rng: of the bootstrap.
        groups: [N] which observations share their noise; each has its own when None. The residuals
            of a group then stay together and are multiplied by one random weight (wild bootstrap).

    Raises:
        ValueError: fewer observations than unknowns.
    """
    if len(y) < law.n_unknowns:
        raise ValueError(f"{law.name}: {len(y)} observations for {law.n_unknowns} unknowns")
    log_y = np.log(y)
    problem = _Problem(law, x)
    starts = [problem.inner(start) for start in _starts(law, x, y)]
    middle = starts[len(starts) // 2]
    # Nearly the absolute loss first, as its residuals show how wide the noise is; then Huber's.
    rough = problem.best(starts, log_y, width=1e-3)
    width = HUBER_SCALES * _scale(log_y - problem.predict(rough), law.n_unknowns)
    best = problem.best([rough, *starts], log_y, width)
    fitted = problem.predict(best)
    n_independent = len(y) if groups is None else len(np.unique(groups))
    # Coefficients of a curve through clustered points: clusters less one, as is usual there.
    spare = n_independent - (law.n_unknowns if groups is None else 1)
    centre = Fit(law, problem.outer(best), np.empty((0, law.n_unknowns)), log_y - fitted, spare)
    origin = best if problem.smallest_share(best) > _VANISHED else middle
    replicates = [
        problem.outer(problem.best([origin], fitted + noise, width))
        for noise in _resampled(centre, n_boot, rng, groups)
    ]
    return Fit(law, centre.theta, np.array(replicates), centre.residuals, spare)


def _resampled(
    fitted: Fit, n_boot: int, rng: np.random.Generator, groups: NDArray[np.int64] | None
) -> Array:
    """[n_boot, N] noise of the bootstrap's data sets."""
    n = len(fitted.residuals)
    if groups is None:
        return rng.choice(fitted.noise, size=(n_boot, n))
    _, member = np.unique(groups, return_inverse=True)
    # Webb's six weights: mean 0, variance 1, and enough of them for few groups.
    six = np.sqrt([0.5, 1.0, 1.5])
    weights = rng.choice(np.concatenate([six, -six]), size=(n_boot, member.max() + 1))
    return np.asarray(weights[:, member] * fitted.residuals)


def _scale(residuals: Array, n_unknowns: int) -> float:
    """Robust standard deviation: an absolute-loss fit passes through as many as its unknowns."""
    sizes = np.sort(np.abs(residuals))[n_unknowns:]
    return max(float(np.median(sizes)) * 1.4826, _SMALLEST_SCALE) if len(sizes) else _SMALLEST_SCALE


def _starts(law: Law, x: Array, y: Array) -> list[Array]:
    """[P] each: the last term takes a share of the lowest loss, the first one explains the rest."""
    first, *rest = law.features(x)
    if not rest:
        return [np.asarray(np.linalg.lstsq(first, np.log(y), rcond=None)[0], np.float64)]
    (last,) = rest
    # The lowest loss among the cells that the last term cannot tell apart.
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
    """Least squares for one law and one set of x, in unknowns that are scaled and uncorrelated.

    ln n and ln k are far from 0, which makes the columns of features nearly parallel; each term's
    are replaced by orthonormal ones (QR), whose unknowns are called inner here.
    """

    def __init__(self, law: Law, x: Array) -> None:
        pairs = [np.linalg.qr(features) for features in law.features(x)]
        self._q = [q for q, _ in pairs]
        self._r = [r for _, r in pairs]
        ends = np.cumsum([q.shape[1] for q in self._q])
        self._parts = [slice(end - q.shape[1], end) for q, end in zip(self._q, ends, strict=True)]

    def inner(self, theta: Array) -> Array:
        """Inner unknowns of a law's."""
        return np.concatenate([r @ theta[p] for r, p in zip(self._r, self._parts, strict=True)])

    def outer(self, inner: Array) -> Array:
        """A law's unknowns."""
        pairs = zip(self._r, self._parts, strict=True)
        return np.concatenate([np.linalg.solve(r, inner[part]) for r, part in pairs])

    def smallest_share(self, inner: Array) -> float:
        """Of the law's terms, the least that one takes where it takes most."""
        shares = np.exp(self._logs(inner) - self.predict(inner))
        return float(shares.max(axis=1).min())

    def predict(self, inner: Array) -> Array:
        """ln L, [N]."""
        return np.asarray(np.logaddexp.reduce(self._logs(inner), axis=0))

    def best(self, starts: list[Array], log_y: Array, width: float) -> Array:
        """The inner unknowns with the lowest loss that the searches from these starts find."""
        # MINPACK may try NaN once a term has vanished; it does not accept what NaN follows from.
        with np.errstate(invalid="ignore"):
            found = [
                least_squares(
                    self._residuals, start, self._jacobian, method="lm", args=(log_y, width)
                )
                for start in starts
            ]
        return np.asarray(min(found, key=lambda result: result.cost).x)

    def _logs(self, inner: Array) -> Array:
        # A floor of 0 is minus infinity here, where sums turn into NaN.
        inner = np.clip(inner, -_FAR, _FAR)
        return np.stack([q @ inner[p] for q, p in zip(self._q, self._parts, strict=True)])

    def _residuals(self, inner: Array, log_y: Array, width: float) -> Array:
        """[N], whose squares are twice Huber's loss: MINPACK knows nothing but squares."""
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
        tail = width / np.sqrt(np.maximum(2 * width * size - width**2, width**2))
        slope = np.where(size <= width, 1.0, tail)
        return -slope[:, None] * np.concatenate(columns, axis=1)
