"""Count how often each latent fires, on a sample of the stored training rows.

The sample is drawn in blocks of consecutive rows, because a store reads whole chunks. Harvested
rows are permuted within their item, so a block mixes rows of many documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.evaluation.measurement import Accumulator, Rows

if TYPE_CHECKING:
    from activation_store import Store
    from sae_core.sharded_inference import ShardedSAE

ROWS_PER_READ = 2048
TYPICAL_BLOCKS = 16
TYPICAL_ROWS = 512
"""Number of blocks, and of rows of each, behind `typical_row`."""

Block = tuple[int, int]
"""Logical rows [start, stop) of a store."""


class RowSample(NamedTuple):
    """The stored rows on which firings are counted."""

    blocks: list[Block]
    """Ascending, without overlaps."""
    n_rows: int
    """Number of rows in all blocks."""
    of_rows: int
    """Number of rows that the sample was drawn from: all that the store still holds."""


class FiringPass(NamedTuple):
    """Result of one pass over a sample."""

    counts: Tensor
    """[L] int64: number of rows in which each latent is above 0."""
    mean: Tensor
    """[D] float64: mean of the rows; zeros if there are no rows."""
    n_rows: int
    """Number of rows read."""


def sample_rows(store: Store, wanted: int | None, seed: int) -> RowSample:
    """Choose blocks of `ROWS_PER_READ` rows at random, without replacement.

    Args:
        store: The store. Deleted rows are not chosen.
        wanted: Number of rows, rounded up to whole blocks; None for all rows.
        seed: Seed of the choice. It has no effect if all rows are chosen.
    """
    # Consumed items are deleted from the front, so skip the rows of all items below the mark.
    first = int(store.valid_rows[: store.read_deletion_mark().below].sum())
    stop = store.n_tokens
    starts = np.arange(first, stop, ROWS_PER_READ)
    if wanted is not None:
        n_blocks = min(-(-wanted // ROWS_PER_READ), len(starts))
        chosen = np.random.default_rng([seed, 3]).choice(len(starts), n_blocks, replace=False)
        starts = starts[np.sort(chosen)]
    blocks = [(int(start), min(int(start) + ROWS_PER_READ, stop)) for start in starts]
    return RowSample(blocks, sum(end - start for start, end in blocks), stop - first)


def typical_row(store: Store, array: str, sample: RowSample) -> Tensor:
    """Return the median of each dimension over rows from all parts of the sample: [D] float64.

    Unlike the mean, it is not affected by a few rows with a huge norm.
    """
    chosen = sample.blocks[:: max(1, -(-len(sample.blocks) // TYPICAL_BLOCKS))]
    rows = [
        store.read(array, start, min(stop, start + TYPICAL_ROWS)).astype(np.float32)
        for start, stop in chosen
    ]
    if not rows:
        return torch.zeros(store.arrays[array], dtype=torch.float64)
    return torch.from_numpy(np.median(np.concatenate(rows), axis=0)).double()


def count_firings(
    sae: ShardedSAE,
    store: Store,
    array: str,
    sample: RowSample,
    accumulators: Sequence[Accumulator] = (),
    progress: Callable[[int], None] = lambda rows: None,
) -> FiringPass:
    """Read and encode the sampled rows of `array` once, in order.

    Args:
        sae: The SAE whose latents are counted.
        store: The store that the SAE was trained on.
        array: Name of the array, which is the hookpoint.
        sample: The rows.
        accumulators: Accumulators that measure the reconstruction of the same rows. If empty, the
            rows are only encoded.
        progress: Called with the number of rows encoded so far, after each group of rows.
    """
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    total = torch.zeros(sae.d_model, dtype=torch.float64)
    done = 0
    for group in _groups(sample.blocks, sae.plan.rows_at_once):
        x = torch.empty(sum(stop - start for start, stop in group), sae.d_model)
        first = 0
        for start, stop in group:
            rows = x[first : first + stop - start]
            rows.copy_(torch.from_numpy(store.read(array, start, stop).astype(np.float32)))
            total += rows.double().sum(0)
            first += len(rows)
        x = x.to(sae.rows_device)
        values, indices = sae.encode_topk(x)
        recon = sae.decode_topk(values, indices) if accumulators else None
        for first in range(0, len(x), ROWS_PER_READ):
            part = slice(first, first + ROWS_PER_READ)
            fired = indices[part][values[part] > 0].cpu()
            counts.scatter_add_(0, fired, torch.ones_like(fired))
            if recon is not None:
                batch = Rows(x[part], recon[part], values[part], indices[part])
                for accumulator in accumulators:
                    accumulator.add_rows(batch)
        done += len(x)
        progress(done)
    return FiringPass(counts, total / max(done, 1), done)


def _groups(blocks: Sequence[Block], most_rows: int) -> Iterator[list[Block]]:
    """Divide blocks into groups of at most `most_rows` rows; larger blocks are divided first."""
    size = min(most_rows, ROWS_PER_READ)
    group: list[Block] = []
    n_rows = 0
    for first, stop in blocks:
        for start in range(first, stop, size):
            end = min(start + size, stop)
            if n_rows + end - start > most_rows:
                yield group
                group, n_rows = [], 0
            group.append((start, end))
            n_rows += end - start
    if group:
        yield group
