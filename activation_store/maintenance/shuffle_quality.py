"""Measure how well the configured shuffle mixes the documents of a store.

    python -m activation_store.maintenance.shuffle_quality STORE
        [--window-items N] [--buffer-tokens N] [--batch-tokens N]

Tokens of the same document have similar activations. A batch with many tokens per document
therefore acts like a smaller batch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from activation_store.config import StoreConfig
from activation_store.reading.store import Store, open_store
from activation_store.reading.stream import ShuffledStream

POOR_RATIO = 2.0
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True)
class ShuffleQuality:
    """Result of `shuffle_quality`.

    The companions of a token are the other tokens of its document in the same batch.
    """

    companions: float
    """Mean number of companions per token in the measured batches."""
    perfect: float
    """Expected number of companions per token in a random permutation of the whole store."""
    batches: int
    """Number of measured batches."""

    @property
    def ratio(self) -> float:
        """Ratio `companions / perfect`; a value below 1 means better mixing than by chance."""
        if self.perfect:
            return self.companions / self.perfect
        return float("inf") if self.companions else 1.0

    @property
    def warning(self) -> str | None:
        """Warning with advice if the ratio is above `POOR_RATIO`, else None."""
        if self.ratio <= POOR_RATIO:
            return None
        return (
            f"warning: a batch holds {self.ratio:.1f} times as many tokens of the same document as "
            "in a perfect shuffle; raise store.buffer_tokens and store.window_items, or harvest "
            "the store again with a smaller store.chunk_bytes"
        )

    def __str__(self) -> str:
        line = (
            f"same-document companions per token: {self.companions:.3f} in {self.batches} "
            f"batches, {self.perfect:.3f} in a perfect shuffle (ratio {self.ratio:.2f})"
        )
        return f"{line}\n{self.warning}" if self.warning else line


def shuffle_quality(
    store: Store,
    seed: int,
    window_items: int,
    buffer_rows: int,
    batch_rows: int,
    max_batches: int = 200,
) -> ShuffleQuality:
    """Measure how well a store is shuffled, reading only the `document` sidecar.

    Args:
        store: A finalised store.
        seed: Seed of the row order.
        window_items: Number of items shuffled together, as for `ShuffledStream`.
        buffer_rows: Number of rows permuted together, as for `ShuffledStream`.
        batch_rows: Number of rows in a global batch.
        max_batches: Maximum number of batches to measure, spread over the first epoch.

    Raises:
        IncompleteStoreError: If the store is not finalised.
        ConfigError: If an argument is invalid, or the store has fewer rows than a batch.
    """
    stream = ShuffledStream(
        store,
        ["document"],
        seed=seed,
        batch_rows=batch_rows,
        window_items=window_items,
        buffer_rows=buffer_rows,
        prefetch=False,
    )
    try:
        count = stream.batches_per_epoch
        chosen = np.unique(np.linspace(0, count - 1, min(count, max_batches)).astype(np.int64))
        companions = []
        for i in chosen.tolist():
            stream.seek(i)
            companions.append(_pairs(stream.next().arrays["document"]) / batch_rows)
    finally:
        stream.close()
    total = store.n_tokens
    perfect = (batch_rows - 1) * _pairs_of_store(store) / max(total * (total - 1), 1)
    return ShuffleQuality(float(np.mean(companions)), perfect, len(companions))


def _pairs(documents: NDArray[np.int64]) -> int:
    """Count the ordered pairs of different rows that belong to the same document."""
    counts = np.unique(documents, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1)).sum())


def _pairs_of_store(store: Store) -> int:
    """Count the ordered pairs of different rows of the same document in the whole store."""
    sizes: dict[int, int] = {}
    for start in range(0, store.n_tokens, _PIECE_ROWS):
        documents = store.read("document", start, min(start + _PIECE_ROWS, store.n_tokens))
        names, counts = np.unique(documents, return_counts=True)
        for name, size in zip(names.tolist(), counts.tolist(), strict=True):
            sizes[name] = sizes.get(name, 0) + size
    return sum(size * (size - 1) for size in sizes.values())


def main() -> None:
    """Print the shuffle quality of a store."""
    usual = StoreConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window-items", type=int, default=usual.window_items)
    parser.add_argument("--buffer-tokens", type=int, default=usual.buffer_tokens)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = parser.parse_args()
    sizes = (options.window_items, options.buffer_tokens, options.batch_tokens)
    print(shuffle_quality(open_store(options.store), options.seed, *sizes))


if __name__ == "__main__":
    main()
