"""Count how often each latent fires, in one pass over the stored training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.evaluation.measurement import Accumulator, Rows

if TYPE_CHECKING:
    from activation_store import Store
    from sae_core import SAE

ROWS_PER_READ = 2048


class FiringPass(NamedTuple):
    """Result of one pass over a store."""

    counts: Tensor
    """[L] int64: number of rows in which each latent is above 0."""
    mean: Tensor
    """[D] float64: mean of the rows; zeros if there are no rows."""
    n_rows: int
    """Number of rows read."""


def count_firings(
    sae: SAE,
    store: Store,
    array: str,
    accumulators: Sequence[Accumulator] = (),
    progress: Callable[[int], None] = lambda rows: None,
) -> FiringPass:
    """Read and encode the rows of `array` once, in order, skipping deleted rows.

    Args:
        sae: The SAE whose latents are counted.
        store: The store that the SAE was trained on.
        array: Name of the array, which is the hookpoint.
        accumulators: Accumulators that measure the reconstruction of the same rows. If empty, the
            rows are only encoded.
        progress: Called with the number of rows read so far, after each batch.
    """
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    total = torch.zeros(sae.d_model, dtype=torch.float64)
    n_rows = 0
    # Consumed items are deleted from the front, so skip the rows of all items below the mark.
    first = int(store.valid_rows[: store.read_deletion_mark().below].sum())
    for start in range(first, store.n_tokens, ROWS_PER_READ):
        rows = store.read(array, start, min(start + ROWS_PER_READ, store.n_tokens))
        x = torch.from_numpy(rows.astype(np.float32)).to(sae.b_dec.device)
        n_rows += len(x)
        total += x.double().sum(0).cpu()
        values, indices = sae.encode_topk(x)
        counts += torch.bincount(indices[values > 0], minlength=len(counts)).cpu()
        if accumulators:
            batch = Rows(x, sae.decode_topk(values, indices), values, indices)
            for accumulator in accumulators:
                accumulator.add_rows(batch)
        progress(start + len(rows))
    return FiringPass(counts, total / max(n_rows, 1), n_rows)
