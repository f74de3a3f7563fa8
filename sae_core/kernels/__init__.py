"""Kernels of the sparse training step: one interface with several implementations.

`ReferenceKernels` defines the correct results.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {"get_kernels": "registry", "square_sum": "stock.update"}
"""Module of each name that is not in `interface`."""


def __getattr__(name: str) -> Any:
    # Import lazily, so that the names of the kernels can be validated without importing torch.
    if name not in __all__:
        raise AttributeError(f"module 'sae_core.kernels' has no attribute {name!r}")
    return getattr(import_module(f"sae_core.kernels.{_HOME.get(name, 'interface')}"), name)
