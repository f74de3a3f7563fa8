"""Count how often each latent fires, in one pass over the stored training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.evaluation.reconstruction import ReconstructionSums

if TYPE_CHECKING:
    from activation_store import Store
    from sae_core import SAE

ROWS_PER_READ = 2048


class FiringPass(NamedTuple):
    """Result of one pass over a store."""

    counts: Tensor
    """[L] int64: number of rows in which each latent is above 0."""
    sums: ReconstructionSums
    """Mean and variance of the rows. Holds reconstruction errors only with `with_errors=True`."""

    @property
    def dead_fraction(self) -> float | None:
        """Fraction of latents that fired on no row; None without rows."""
        return float((self.counts == 0).double().mean()) if self.sums.rows else None


def count_firings(
    sae: SAE,
    store: Store,
    array: str,
    *,
    with_errors: bool,
    progress: Callable[[int], None] = lambda rows: None,
) -> FiringPass:
    """Read the rows of `array` once, in order, and encode them; deleted rows are skipped.

    Args:
        sae: The SAE whose latents are counted.
        store: The store that the SAE was trained on.
        array: Name of the array: the hookpoint.
        with_errors: Also reconstruct the rows, to measure fvu, mse and l0 on them.
        progress: Called with the number of rows read so far, after each batch.
    """
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    sums = ReconstructionSums(sae.d_model)
    # Consumed items are deleted from the front: skip the rows of all items below the mark.
    first = int(store.valid_rows[: store.read_deletion_mark().below].sum())
    for start in range(first, store.n_tokens, ROWS_PER_READ):
        rows = store.read(array, start, min(start + ROWS_PER_READ, store.n_tokens))
        x = torch.from_numpy(rows.astype(np.float32)).to(sae.b_dec.device)
        sums.add_rows(x)
        values, indices = sae.encode_topk(x)
        counts += torch.bincount(indices[values > 0], minlength=len(counts)).cpu()
        if with_errors:
            sums.add_reconstruction(x, sae.decode_topk(values, indices), values)
        progress(start + len(rows))
    return FiringPass(counts, sums)
