"""Conversion of a store's rows to torch tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def to_torch(rows: NDArray[np.generic]) -> torch.Tensor:
    """Return rows of any dtype of a store as a tensor that shares their memory."""
    # torch rejects NumPy's bfloat16, so pass the raw bits.
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
