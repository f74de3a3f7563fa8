"""A sample of rows from all parts of a store, and a warning if the parts differ.

The harvest puts contexts into a random order, so any of its rows are a random sample. Stores of a
user's own activations may be ordered, for example by source: their first rows are then not
representative of the rest.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store import Store
from cluster.training.device_gather import to_torch
from cluster.training.shared_reads import SharedReads

BLOCK_ROWS = 256
"""Number of consecutive rows that are read at one place."""
_SECTIONS = 16
"""Number of parts of a store whose means are compared."""
_LARGE_TOP_SHARE = 0.1
"""Share of the variance in 1% of the rows above which there is a warning."""
_LARGE_SHARE = 0.05
"""Share of the variance between the parts above which a store counts as ordered."""


def has_random_order(store: Store) -> bool:
    """Return True if the store was harvested, and its contexts are therefore in a random order."""
    return "tokens_wanted" in (store.header.provenance or {})


def spread_blocks(n_rows: int, wanted: int) -> list[tuple[int, int]]:
    """Return evenly spaced blocks [start, stop) of together `wanted` of `n_rows` rows.

    All blocks have the same size, so a few rows may be missing at the end of the last one.
    """
    wanted = min(wanted, n_rows)
    n_blocks = max(1, math.ceil(wanted / BLOCK_ROWS))
    size = max(1, wanted // n_blocks)
    starts = np.linspace(0, n_rows - size, n_blocks).astype(int)
    return [(int(start), int(start) + size) for start in starts]


def read_spread(
    store: Store, array: str, wanted: int, seed: int, shared_reads: SharedReads | None = None
) -> torch.Tensor:
    """Read rows from all parts of a finished store, in a random order; collective.

    Args:
        store: A finalised store.
        array: Name of the array.
        wanted: Number of rows; all rows if the store has fewer.
        seed: Seed of the order.
        shared_reads: Shared reads of ranks that need the same rows. If None, this rank reads alone.

    Returns:
        [n, D] on the device of `shared_reads`, or on the CPU.
    """
    shared = shared_reads or SharedReads()
    parts = []
    for start, stop in spread_blocks(store.n_tokens, wanted):
        read = partial(store.read, array, *shared.part(start, stop))
        parts.append(shared.gather(to_torch(shared.read(read)), stop - start))
    sample = torch.cat(parts)
    generator = torch.Generator().manual_seed(seed)
    return sample[torch.randperm(len(sample), generator=generator).to(sample.device)]


def order_warning(store: Store, array: str, wanted: int) -> str | None:
    """Return a warning if parts of the store have clearly different means, or None.

    Args:
        store: A finalised store.
        array: Name of the array.
        wanted: Number of rows to look at.
    """
    blocks = spread_blocks(store.n_tokens, wanted)
    if has_random_order(store) or len(blocks) < 2 * _SECTIONS:
        return None
    rows = [to_torch(store.read(array, start, stop)).double().numpy() for start, stop in blocks]
    share = variance_between(rows)
    if share < _LARGE_SHARE:
        return None
    return (
        f"{share:.0%} of the variance of {array} lies between sixteenths of {store.path}: its rows "
        "are ordered, for example by source, and training sees one part after another; shuffle "
        "them before writing, or raise store.window_items"
    )


def concentration_warning(store: Store, array: str, wanted: int) -> str | None:
    """Return a warning if 1% of the rows have much of the variance, or None.

    Args:
        store: A finalised store.
        array: Name of the array.
        wanted: Number of rows to look at.
    """
    blocks = spread_blocks(store.n_tokens, wanted)
    rows = [to_torch(store.read(array, start, stop)).double() for start, stop in blocks]
    share = top_share(torch.cat(rows))
    if share < _LARGE_TOP_SHARE:
        return None
    return (
        f"1% of the rows of {array} in {store.path} have {share:.0%} of the variance: the SAE "
        "will mostly learn these, and its fvu mostly measure how well it reconstructs them; leave "
        "them out "
        "(data.max_norm_multiple for a harvest)"
    )


def top_share(rows: torch.Tensor) -> float:
    """Return the share of the variance that the 1% of the rows farthest from the mean have.

    Args:
        rows: [n, D] float64.
    """
    distances = (rows - rows.mean(0)).square().sum(1)
    total = float(distances.sum())
    return float(distances.topk(-(-len(rows) // 100)).values.sum()) / total if total else 0.0


def variance_between(blocks: list[NDArray[np.float64]]) -> float:
    """Return the share of the total variance that lies between sections of consecutive blocks.

    Args:
        blocks: [n, D] rows each, in the order of the store.
    """
    sections = [
        np.concatenate(blocks[i * len(blocks) // _SECTIONS : (i + 1) * len(blocks) // _SECTIONS])
        for i in range(_SECTIONS)
    ]
    rows = np.concatenate(sections)
    mean = rows.mean(axis=0)
    total = float(np.square(rows - mean).sum())
    between = sum(len(s) * float(np.square(s.mean(axis=0) - mean).sum()) for s in sections)
    # Random rows give (sections - 1) / (rows - 1).
    return max(0.0, between / total - (_SECTIONS - 1) / (len(rows) - 1)) if total else 0.0
