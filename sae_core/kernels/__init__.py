"""Kernels of the sparse training step: one interface with several implementations.

`ReferenceKernels` defines the correct results.
"""

from sae_core.kernels.interface import (
    AdamStep,
    Decoded,
    Kernels,
    RowGradients,
    RowState,
    RowUpdate,
    SparseGradient,
    SparseLatents,
    compact,
    project,
)
from sae_core.kernels.registry import get_kernels
from sae_core.kernels.stock.update import square_sum

__all__ = [
    "AdamStep",
    "Decoded",
    "Kernels",
    "RowGradients",
    "RowState",
    "RowUpdate",
    "SparseGradient",
    "SparseLatents",
    "compact",
    "get_kernels",
    "project",
    "square_sum",
]
