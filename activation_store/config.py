"""Settings of the store and of the order in which it is read.

This file must not import NumPy, because `--help` imports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from activation_store.codecs.registry import CODECS
from foundation.errors import ConfigError

OBJECT_SCHEME = "s3://"
"""Beginning of the address of a store in an object store."""


@dataclass
class MixedStore:
    """An additional store to train on."""

    path: str = ""
    """Folder of the store, or s3://bucket/prefix."""
    weight: float = 1.0
    """Share of this store in each batch, relative to `store.weight` and to the weights of the other
    stores."""


@dataclass
class StoreConfig:
    """Location, file layout and shuffling of the activation store."""

    path: str = ""
    """Folder of the store, or s3://bucket/prefix."""
    dtype: str = "bfloat16"
    """Data type of the rows that readers get: bfloat16 or float32."""
    codec: str = "none"
    """Codec of the rows: none (uncompressed), blosc (lossless, about 1.4 times smaller, slower to
    read), int8 (quantised to half the size of bfloat16), or a codec from an installed package."""
    shard_tokens: int = 8192
    """Maximum number of rows per shard file. One work item fills one shard of every array."""
    chunk_bytes: int = 1 << 20
    """Target size in bytes of a chunk, which is the smallest unit that is read and checksummed."""
    window_items: int = 16
    """Number of consecutive work items that are shuffled together; they form a window. While the
    store is still being harvested, a window can be read once all of its items are committed."""
    buffer_tokens: int = 65_536
    """Number of rows that are held in memory and permuted together, divided among the ranks. A
    larger buffer mixes documents better."""
    order_seed: int | None = None
    """Seed of the row order. If null, the run's `seed` is used. Runs with the same order_seed see
    the same batches, even if they differ in `seed` and therefore in their initial weights."""
    mixture: list[MixedStore] = field(default_factory=list)
    """Additional stores to train on, which must be finalised. Every batch holds rows of all stores
    in proportion to their weights. Evaluation and feature pages use only `path`."""
    weight: float = 1.0
    """Share of the store at `path` in a mixture, relative to the weights of the other stores."""

    @property
    def paths(self) -> list[str]:
        """Paths of all stores that training reads; `path` comes first."""
        return [self.path, *(mixed.path for mixed in self.mixture)]

    @property
    def weights(self) -> list[float]:
        """Mixture weights, in the order of `paths`."""
        return [self.weight, *(mixed.weight for mixed in self.mixture)]

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a setting is invalid. The message names the setting.
        """
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError("store.dtype", self.dtype, "bfloat16 or float32")
        CODECS.check(self.codec)
        for name in ("shard_tokens", "chunk_bytes", "window_items", "buffer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"store.{name}", getattr(self, name), "at least 1")
        if self.order_seed is not None and self.order_seed < 0:
            raise ConfigError("store.order_seed", self.order_seed, "0 or more, or null")
        for number, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight > 0):
                key = f"store.mixture[{number - 1}].weight" if number else "store.weight"
                raise ConfigError(key, weight, "a finite number above 0")
        if not all(mixed.path for mixed in self.mixture):
            raise ConfigError(
                "store.mixture",
                "an entry without a path",
                "a path in every entry {path: ..., weight: ...}",
            )
        for path in self.paths:
            if "://" in path and not path.startswith(OBJECT_SCHEME):
                raise ConfigError(
                    "store.path", path, f"a folder, or an address {OBJECT_SCHEME}bucket/prefix"
                )
        if len(set(self.paths)) < len(self.paths):
            raise ConfigError(
                "store.mixture",
                self.paths,
                "each store only once, store.path included",
                "to read more rows of a store, give it a larger weight",
            )
