"""What a user may set about the store and the order it is read in. No NumPy import here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from activation_store.errors import StoreConfigError


@dataclass
class MixedStore:
    """Another store whose rows a run trains on."""

    path: str = ""
    weight: float = 1.0
    """Beside `StoreConfig.weight`: only the ratios matter."""


@dataclass
class StoreConfig:
    """Where activations live, in which pieces, and how they are shuffled when read."""

    path: str = ""
    dtype: str = "bfloat16"
    """bfloat16 or float32: of the rows that readers get."""
    codec: str = "none"
    """none; blosc: lossless, about 1.4 times smaller, slower to read; int8: half of bfloat16."""
    shard_tokens: int = 8192
    """Rows of one shard file; one work item fills one shard of every array."""
    chunk_bytes: int = 1 << 20
    """Target size of an inner chunk, the unit of a read and of a checksum."""
    window_items: int = 16
    """Work items shuffled together; in epoch 0 a window opens when all of it is committed."""
    buffer_tokens: int = 65_536
    """Rows permuted together, each rank holding its part; larger mixes documents better."""
    order_seed: int | None = None
    """Fixes the order of the rows; null: the run's `seed`. Runs that share it see the same batches,
    whatever dictionaries their seeds begin with."""
    mixture: list[MixedStore] = field(default_factory=list)
    """Finished stores to train on as well: every batch holds rows of each by its weight. Evaluation
    and pages keep to `path`."""
    weight: float = 1.0
    """Of `path` in a mixture."""

    @property
    def paths(self) -> list[str]:
        """Of all stores that training reads."""
        return [self.path, *(mixed.path for mixed in self.mixture)]

    @property
    def weights(self) -> list[float]:
        """In the order of `paths`."""
        return [self.weight, *(mixed.weight for mixed in self.mixture)]

    def validate(self) -> None:
        """Raises: StoreConfigError: naming the setting that cannot be."""
        if self.dtype not in ("bfloat16", "float32"):
            raise StoreConfigError("store.dtype", self.dtype, "bfloat16 or float32")
        if self.codec not in ("none", "blosc", "int8"):
            raise StoreConfigError("store.codec", self.codec, "none, blosc or int8")
        for name in ("shard_tokens", "chunk_bytes", "window_items", "buffer_tokens"):
            if getattr(self, name) < 1:
                raise StoreConfigError(f"store.{name}", getattr(self, name), "at least 1")
        if self.order_seed is not None and self.order_seed < 0:
            raise StoreConfigError("store.order_seed", self.order_seed, "0 or more, or null")
        for number, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight > 0):
                key = f"store.mixture[{number - 1}].weight" if number else "store.weight"
                raise StoreConfigError(key, weight, "a finite number above 0")
        if not all(mixed.path for mixed in self.mixture):
            raise StoreConfigError(
                "store.mixture", "an entry without path", "[{path: ..., weight: ...}, ...]"
            )
        if len(set(self.paths)) < len(self.paths):
            raise StoreConfigError(
                "store.mixture", self.paths, "each store once", "give it a larger weight"
            )
