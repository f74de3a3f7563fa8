"""Architecture name to module."""

from __future__ import annotations

from sae_core.architectures.topk import TopKSAE
from sae_core.config import SAEConfig
from sae_core.errors import ConfigError
from sae_core.kernels import Kernels
from sae_core.mesh import Mesh

_ARCHITECTURES = {"topk": TopKSAE}


def build_sae(config: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int) -> TopKSAE:
    """This rank's shard of a freshly initialised SAE.

    Raises:
        ConfigError: the architecture is not known.
    """
    if config.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError("sae.architecture", config.architecture, f"one of: {known}")
    return _ARCHITECTURES[config.architecture](config, d_model, mesh, kernels, seed)
