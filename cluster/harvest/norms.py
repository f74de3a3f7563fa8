"""Rows of huge norm: a limit from the first work item, and the rows above it.

A few tokens away from position 0, such as the first newline, can have norms many times the usual
one. They hold much of the variance, so an SAE spends most of its capacity on them, and its FVU
mostly measures how well it reconstructs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
"""Rows [n, D] of each hookpoint, or a column [n] of each sidecar."""
_SHOWN_TOKENS = 5


class NormStatistics(NamedTuple):
    """Norms of a hookpoint's rows in the first work item."""

    median: float
    """Median Euclidean norm."""
    largest: float
    """Largest norm."""
    token_id: int
    """Token of the row with the largest norm."""
    position: int
    """Position of that token in its document."""


def norm_statistics(rows: Arrays, sidecars: Arrays) -> dict[str, NormStatistics]:
    """Return the norms of each hookpoint's rows."""
    found = {}
    for name, values in rows.items():
        norms = row_norms(values)
        top = int(norms.argmax())
        found[name] = NormStatistics(
            float(np.median(norms)),
            float(norms[top]),
            int(sidecars["token_id"][top]),
            int(sidecars["position"][top]),
        )
    return found


def max_norms(statistics: Mapping[str, NormStatistics], multiple: float | None) -> dict[str, float]:
    """Return the largest norm that is stored for each hookpoint; {} without a limit.

    Args:
        statistics: Norms in the first work item.
        multiple: Limit as a multiple of the median norm (`data.max_norm_multiple`).
    """
    if multiple is None:
        return {}
    return {name: multiple * one.median for name, one in statistics.items()}


def within(rows: Arrays, limits: Mapping[str, float]) -> NDArray[np.bool_]:
    """Return a mask [n] of the rows that are at most at the limit at every hookpoint."""
    kept = np.ones(len(next(iter(rows.values()))), np.bool_)
    for name, values in rows.items():
        if name in limits:
            kept &= row_norms(values) <= limits[name]
    return kept


def statistics_line(name: str, one: NormStatistics, tokenizer: Any) -> str:
    """Return a line to print about the norms of a hookpoint."""
    multiple = one.largest / one.median if one.median else float("inf")
    return (
        f"norms of {name} in the first item: median {one.median:.3g}, largest {multiple:.1f} times "
        f"that, of {tokenizer.decode([one.token_id])!r} at position {one.position} of its document"
    )


def dropped_line(dropped: Counter[int], rows: int, multiple: float, tokenizer: Any) -> str:
    """Return a line to print about the rows that were left out.

    Args:
        dropped: Number of rows left out for each token id.
        rows: Number of rows that were stored.
        multiple: Limit as a multiple of the median norm.
        tokenizer: Tokenizer of the model.
    """
    n_dropped = dropped.total()
    tokens = ", ".join(
        f"{tokenizer.decode([token])!r} ({count:,})"
        for token, count in dropped.most_common(_SHOWN_TOKENS)
    )
    return (
        f"{n_dropped:,} of {n_dropped + rows:,} rows have more than {multiple:g} times the median "
        f"norm and were left out (data.max_norm_multiple); most often the tokens {tokens}"
    )


def row_norms(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the Euclidean norms [n] of rows [n, D]."""
    return np.linalg.norm(values.astype(np.float64), axis=1)
