"""Rows as the store gives them, as torch tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def to_torch(rows: NDArray[np.generic]) -> torch.Tensor:
    """Rows of any dtype of a store; torch does not know NumPy's bfloat16, only its bits."""
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
