"""Settings shared by all architectures. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

from foundation.errors import ConfigError

INPUT_TRANSFORMS = ("center", "scale", "per_channel", "whiten")


class AuxiliaryPath(NamedTuple):
    """A second pass of a training step through the dead latents."""

    latents: int
    """Dead latents selected per row."""
    row_share: float
    """Fraction of the batch rows that take this path."""


@dataclass
class SAEConfig:
    """Settings shared by all architectures; each architecture adds its own in a subclass."""

    sparse_gradient: ClassVar[bool] = False
    """True if training produces the gradient of the dictionary rows as a `SparseGradient`, which
    the fused update (`optim.update`) requires."""

    architecture: str = ""
    """Name of the architecture in the registry; each subclass has its own default."""
    hookpoint: str | None = None
    """Hookpoint (array of the store) that this SAE reconstructs. May be null if there is only
    one."""
    n_latents: int = 4096
    """Number of latents in the dictionary."""
    dead_after_tokens: int | None = None
    """A latent counts as dead when it has not fired on this many training tokens. If null, a tenth
    of `train.tokens`, at most 10,000,000."""
    input_transform: str = "scale"
    """Map of the activations before the SAE, folded into its weights when it is exported or loaded.
    center: subtract the mean. scale: also divide all channels by one number. per_channel: divide
    each channel by its standard deviation. whiten: make the covariance the identity. With the last
    two, the loss and the FVU of the training log are those of the mapped activations."""
    whiten_epsilon: float = 1e-3
    """With input_transform=whiten: added to all variances, as a fraction of their mean, so that
    directions of little variance do not become noise."""

    def validate(self) -> None:
        """Validate all fields except `architecture`, which `check_settings` checks.

        Raises:
            ConfigError: If a value is out of range.
        """
        if self.n_latents < 1:
            raise ConfigError("sae.n_latents", self.n_latents, "at least 1")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise ConfigError(
                "sae.dead_after_tokens", self.dead_after_tokens, "at least 1, or null"
            )
        if self.input_transform not in INPUT_TRANSFORMS:
            expected = f"one of: {', '.join(INPUT_TRANSFORMS)}"
            raise ConfigError("sae.input_transform", self.input_transform, expected)
        if self.whiten_epsilon <= 0:
            raise ConfigError("sae.whiten_epsilon", self.whiten_epsilon, "more than 0")

    def resolved(self, d_model: int, batch_tokens: int, train_tokens: int) -> Self:
        """Return these settings with the values that depend on the sizes of the run filled in.

        The trainer calls this before it builds the SAE, so that checkpoints contain the values.

        Args:
            d_model: Width of the activations.
            batch_tokens: Rows of the global batch.
            train_tokens: Training tokens of the whole run.
        """
        after = self.dead_after_tokens or default_dead_after_tokens(train_tokens)
        return replace(self, dead_after_tokens=after)

    def active_latents(self) -> int | None:
        """Return the number of active latents per token, or None if it depends on the data."""
        return None

    def lr_share(self, tokens: int) -> float:
        """Return the factor of the learning rate in the step that starts after `tokens` tokens."""
        return 1.0

    def has_unit_decoder(self) -> bool:
        """Return True if decoder rows have unit norm in the units of training."""
        return True

    def map_shape(self, d_model: int) -> tuple[int, ...] | None:
        """Return the shape of the map of the inputs: [D], [D, D], or None if there is none."""
        shapes = {"per_channel": (d_model,), "whiten": (d_model, d_model)}
        return shapes.get(self.input_transform)

    def auxiliary_path(self, d_model: int) -> AuxiliaryPath | None:
        """Return the pass through the dead latents, for the plan, or None if there is no such pass.

        Args:
            d_model: Width of the activations.
        """
        return None


def default_dead_after_tokens(train_tokens: int) -> int:
    """Return a tenth of the training tokens, at most 10,000,000 (Gao et al. 2024)."""
    return max(1, min(10_000_000, train_tokens // 10))
