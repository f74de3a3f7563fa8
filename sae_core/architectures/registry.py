"""Build an SAE by the name of its architecture."""

from __future__ import annotations

from foundation.errors import ConfigError
from sae_core.architectures.topk import TopKSAE
from sae_core.config import SAEConfig
from sae_core.distributed.mesh import Mesh
from sae_core.kernels import Kernels

_ARCHITECTURES = {"topk": TopKSAE}


def build_sae(config: SAEConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int) -> TopKSAE:
    """Build this rank's shard of a newly initialised SAE.

    Args:
        config: architecture, sizes and coefficients.
        d_model: width D of the activations.
        mesh: this rank's position; dictionary rows are split over its latent group.
        kernels: implementation of the sparse operations.
        seed: seed of the initial dictionary, which does not depend on the number of shards.

    Raises:
        ConfigError: If the architecture is unknown.
    """
    if config.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError("sae.architecture", config.architecture, f"one of: {known}")
    return _ARCHITECTURES[config.architecture](config, d_model, mesh, kernels, seed)
