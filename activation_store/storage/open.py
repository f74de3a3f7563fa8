"""Choose the storage for a path or an address."""

from __future__ import annotations

from pathlib import Path

from activation_store.config import OBJECT_SCHEME
from activation_store.storage.base import Storage


def open_storage(path: str | Path | Storage) -> Storage:
    """Return the storage at `path`, which is s3://bucket/prefix or a folder.

    Raises:
        ConfigError: If the address is invalid.
    """
    if isinstance(path, Storage):
        return path
    if str(path).startswith(OBJECT_SCHEME):
        # Import late, because obstore is an optional dependency.
        from activation_store.storage.object_store import ObjectStorage

        return ObjectStorage(str(path))
    from activation_store.storage.local import LocalStorage

    return LocalStorage(Path(path))
