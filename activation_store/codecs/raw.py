"""The codec `none`, which stores rows unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np

from activation_store.codecs.base import Codec, DiskArray


class Raw(Codec):
    """Codec that stores rows in the store's dtype, uncompressed."""

    def disk_arrays(self, dtype: np.dtype[Any], width: int) -> dict[str, DiskArray]:
        """Return one array, which holds the rows."""
        return {"": DiskArray(dtype, (width,))}


RAW = Raw()
