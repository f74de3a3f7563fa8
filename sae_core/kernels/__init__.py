"""Kernels of the sparse training step: one interface with several implementations.

`ReferenceKernels` defines the correct results.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_core.kernels.gradients import input_bias_gradient, project
    from sae_core.kernels.interface import (
        EMPTY,
        AdamStep,
        Affine,
        Centred,
        Decoded,
        Kernels,
        RowGradients,
        RowState,
        RowUpdate,
        SparseGradient,
        SparseLatents,
        Subset,
    )
    from sae_core.kernels.pairs import active_pairs, compact, in_slots, subset_of
    from sae_core.kernels.registry import get_kernels
    from sae_core.kernels.stock.update import square_sum

__all__ = [
    "EMPTY",
    "AdamStep",
    "Affine",
    "Centred",
    "Decoded",
    "Kernels",
    "RowGradients",
    "RowState",
    "RowUpdate",
    "SparseGradient",
    "SparseLatents",
    "Subset",
    "active_pairs",
    "compact",
    "get_kernels",
    "in_slots",
    "input_bias_gradient",
    "project",
    "square_sum",
    "subset_of",
]

_HOME = {
    "active_pairs": "pairs",
    "compact": "pairs",
    "get_kernels": "registry",
    "in_slots": "pairs",
    "input_bias_gradient": "gradients",
    "project": "gradients",
    "square_sum": "stock.update",
    "subset_of": "pairs",
}
"""Module of each name that is not in `interface`."""


def __getattr__(name: str) -> Any:
    # Import lazily, so that the names of the kernels can be validated without importing torch.
    if name not in __all__:
        raise AttributeError(f"module 'sae_core.kernels' has no attribute {name!r}")
    return getattr(import_module(f"sae_core.kernels.{_HOME.get(name, 'interface')}"), name)
