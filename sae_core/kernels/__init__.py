"""The sparse step's kernels: one interface, several bodies. `reference` defines the answer."""

from sae_core.kernels.interface import Kernels, RowGradients, SparseLatents, compact
from sae_core.kernels.registry import get_kernels

__all__ = ["Kernels", "RowGradients", "SparseLatents", "compact", "get_kernels"]
