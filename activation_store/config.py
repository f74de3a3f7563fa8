"""What a user may set about the store and the order it is read in. No NumPy import here."""

from __future__ import annotations

from dataclasses import dataclass

from activation_store.errors import StoreConfigError


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
