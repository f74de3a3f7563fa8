"""Settings that all architectures share. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from foundation.errors import ConfigError


class AuxiliaryPath(NamedTuple):
    """A second pass of a training step through the dead latents."""

    latents: int
    """Dead latents selected per row."""
    row_share: float
    """Fraction of the batch rows that take this path."""


@dataclass
class SAEConfig:
    """Settings that all architectures share; each architecture adds its own in a subclass."""

    sparse_gradient: ClassVar[bool] = False
    """True if training produces the gradient of the dictionary rows as a `SparseGradient`, which
    the fused update (`optim.update`) requires."""

    architecture: str = ""
    """Name of the architecture in the registry; each subclass has its own default."""
    hookpoint: str | None = None
    """Hookpoint (array of the store) that this SAE reconstructs. If null, the store's first."""
    n_latents: int = 4096
    """Number of latents in the dictionary."""
    dead_after_tokens: int = 10_000_000
    """A latent counts as dead when it has not fired on this many training tokens."""

    def validate(self) -> None:
        """Validate all fields except `architecture`, which `check_settings` checks.

        Raises:
            ConfigError: If a value is out of range.
        """
        if self.n_latents < 1:
            raise ConfigError("sae.n_latents", self.n_latents, "at least 1")
        if self.dead_after_tokens < 1:
            raise ConfigError("sae.dead_after_tokens", self.dead_after_tokens, "at least 1")

    def active_latents(self) -> int | None:
        """Return the number of active latents per token, or None if it depends on the data."""
        return None

    def auxiliary_path(self, d_model: int) -> AuxiliaryPath | None:
        """Return the pass through the dead latents, for the plan, or None if there is no such pass.

        Args:
            d_model: Width of the activations.
        """
        return None
