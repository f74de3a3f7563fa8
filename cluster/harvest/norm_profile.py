"""Norms of rows by position and by token, for the run's report.

Where the norm of a row depends on its position or token, an SAE spends itself on the loudest rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.harvest.norms import Arrays, row_norms

_SHOWN_TOKENS = 8


class NormGroup(NamedTuple):
    """Norms of the rows of some positions, or of one token."""

    first: int
    """First position of the group in a document, or the id of the token."""
    last: int
    """Last position, or the id of the token."""
    rows: int
    """Number of rows."""
    median: float
    """Median Euclidean norm."""
    largest: float
    """Largest norm."""


class NormProfile(NamedTuple):
    """Norms of a hookpoint's rows in the first work item, before any are left out."""

    by_position: list[NormGroup]
    """Groups 0, 1, 2-3, 4-7, … of the positions in a document that have rows."""
    by_token: list[NormGroup]
    """The tokens of the largest norms, largest first."""


def norm_profiles(rows: Arrays, sidecars: Arrays) -> dict[str, NormProfile]:
    """Return the norms of each hookpoint's rows by position and token.

    Args:
        rows: Rows [n, D] of each hookpoint.
        sidecars: `position` and `token_id` of each row, [n].
    """
    tokens = sidecars["token_id"].astype(np.int64)
    # Groups double in length: 0, 1, 2-3, 4-7, …
    octaves = np.frexp(sidecars["position"].astype(np.float64))[1].astype(np.int64)
    found = {}
    for name, values in rows.items():
        norms = row_norms(values)
        by_position = []
        for octave in np.unique(octaves).tolist():
            first, last = (2 ** (octave - 1), 2**octave - 1) if octave else (0, 0)
            by_position.append(_group(first, last, norms[octaves == octave]))
        largest = np.zeros(int(tokens.max()) + 1)
        np.maximum.at(largest, tokens, norms)
        loudest = np.argsort(-largest, kind="stable")[:_SHOWN_TOKENS]
        by_token = [
            _group(token, token, norms[tokens == token])
            for token in loudest.tolist()
            if (tokens == token).any()
        ]
        found[name] = NormProfile(by_position, by_token)
    return found


def _group(first: int, last: int, norms: NDArray[np.float64]) -> NormGroup:
    return NormGroup(first, last, len(norms), float(np.median(norms)), float(norms.max()))


def as_json(profiles: Mapping[str, NormProfile], tokenizer: Any) -> dict[str, Any]:
    """Return profiles for a store's header and `harvest.json`, with the texts of the tokens."""
    return {
        name: {
            "by_position": [group._asdict() for group in profile.by_position],
            "by_token": [
                {"token": tokenizer.decode([group.first]), **group._asdict()}
                for group in profile.by_token
            ],
        }
        for name, profile in profiles.items()
    }
