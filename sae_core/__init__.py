"""Sparse autoencoders: architectures, kernels, optimiser, mesh, trainer, checkpoints, inference."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_core.inference import SAE, load_sae
    from sae_core.training.source import ActivationSource, Batch
    from sae_core.training.trainer import Trainer

__all__ = ["SAE", "ActivationSource", "Batch", "Trainer", "load_sae"]

_HOME = {
    "SAE": "inference",
    "load_sae": "inference",
    "ActivationSource": "training.source",
    "Batch": "training.source",
    "Trainer": "training.trainer",
}


def __getattr__(name: str) -> Any:
    # Import lazily, so that configs and errors can be used without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module 'sae_core' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sae_core.{_HOME[name]}"), name)
