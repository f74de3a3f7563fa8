"""How well a store is shuffled as configured: how much of a batch comes from the same documents.

python -m activation_store.diagnose STORE [--window-items N] [--buffer-tokens N] [--batch-tokens N]

Neighbouring tokens of a document have much alike, and a batch full of them is a smaller batch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from activation_store.config import StoreConfig
from activation_store.store import Store, open_store
from activation_store.stream import ShuffledStream

POOR_RATIO = 2.0
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True)
class ShuffleQuality:
    """Same-document companions of a token in its batch: how many other tokens of its document."""

    companions: float
    """Mean over tokens and batches, as read."""
    perfect: float
    """What a permutation of the whole store would give on average."""
    batches: int
    """How many were looked at."""

    @property
    def ratio(self) -> float:
        """companions / perfect; below 1 a batch is spread more evenly than by chance."""
        if self.perfect:
            return self.companions / self.perfect
        return float("inf") if self.companions else 1.0

    @property
    def warning(self) -> str | None:
        """What to do about it, where it is poor."""
        if self.ratio <= POOR_RATIO:
            return None
        return (
            f"warning: tokens meet {self.ratio:.1f} times as many of their own document in a batch "
            "as in a perfect shuffle; raise store.buffer_tokens and store.window_items, or "
            "write the store with a smaller store.chunk_bytes"
        )

    def __str__(self) -> str:
        line = (
            f"same-document companions per token: {self.companions:.3f} in {self.batches} "
            f"batches, {self.perfect:.3f} if perfectly shuffled (ratio {self.ratio:.2f})"
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
    """Reads the `document` sidecar in the order of a training run, and nothing else.

    Args:
        store: Finalised.
        seed: Of the order.
        window_items: As of `ShuffledStream`.
        buffer_rows: As of `ShuffledStream`.
        batch_rows: Rows of the global batch.
        max_batches: Batches to look at, spread over the first epoch.

    Raises:
        IncompleteStoreError: The store may still grow.
        StoreConfigError: A value that cannot be, or a store of fewer rows than a batch.
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
    """Ordered pairs of different rows of one document."""
    counts = np.unique(documents, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1)).sum())


def _pairs_of_store(store: Store) -> int:
    sizes: dict[int, int] = {}
    for start in range(0, store.n_tokens, _PIECE_ROWS):
        documents = store.read("document", start, min(start + _PIECE_ROWS, store.n_tokens))
        names, counts = np.unique(documents, return_counts=True)
        for name, size in zip(names.tolist(), counts.tolist(), strict=True):
            sizes[name] = sizes.get(name, 0) + size
    return sum(size * (size - 1) for size in sizes.values())


def main() -> None:
    """Prints the figures for a store."""
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
