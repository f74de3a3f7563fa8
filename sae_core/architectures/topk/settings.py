"""Settings of the TopK architecture, and its entry in the registry. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from foundation.errors import ConfigError
from sae_core.architectures.registry import Architecture
from sae_core.architectures.settings import AuxiliaryPath, SAEConfig
from sae_core.training_metrics import TrainingMetric, mean_over_steps

MOST_AUX_PAIRS = 1 << 23
"""Largest number of (row, latent) pairs of the auxiliary path in a global batch if `auxk_rows` is
null. They take at most about 2 GiB on a GPU."""


@dataclass
class TopKConfig(SAEConfig):
    """Settings of a TopK SAE."""

    sparse_gradient: ClassVar[bool] = True

    architecture: str = "topk"
    """Name of the architecture in the registry."""
    k: int = 32
    """Number of active latents per token."""
    auxk: int | None = None
    """Number of dead latents per token with which the auxiliary loss reconstructs the residual. If
    null, d_model / 2 rounded down to a power of two."""
    auxk_coef: float = 1 / 32
    """Weight of the auxiliary loss; 0 switches it off."""
    auxk_rows: float | None = None
    """Fraction of the batch rows used to estimate the auxiliary loss; 1 means all of them. If null,
    all rows, or the largest 1, 1/2, 1/4, ... of them at which auxk times rows is at most 2**23; the
    choice is printed by the plan and saved in checkpoints."""

    def validate(self) -> None:
        """Validate all fields; see `SAEConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        if not 1 <= self.k <= self.n_latents:
            raise ConfigError(
                "sae.k",
                self.k,
                f"between 1 and sae.n_latents={self.n_latents}",
                "lower sae.k or raise sae.n_latents",
            )
        if self.auxk is not None and self.auxk < 1:
            raise ConfigError("sae.auxk", self.auxk, "at least 1, or null for d_model / 2")
        if self.auxk_coef < 0:
            raise ConfigError("sae.auxk_coef", self.auxk_coef, "0 (off) or more")
        if self.auxk_rows is not None and not 0 < self.auxk_rows <= 1:
            raise ConfigError(
                "sae.auxk_rows", self.auxk_rows, "a fraction above 0 and at most 1, or null"
            )

    def active_latents(self) -> int:
        """Return `k`."""
        return self.k

    def auxiliary_path(self, d_model: int) -> AuxiliaryPath | None:
        """Return the pass of the auxiliary loss, or None if `auxk_coef` is 0."""
        if self.auxk_coef == 0:
            return None
        share = 1.0 if self.auxk_rows is None else self.auxk_rows
        return AuxiliaryPath(self.auxk or default_auxk(d_model), share)

    def resolved(self, d_model: int, batch_tokens: int, train_tokens: int) -> Self:
        """Return the settings with numbers instead of nulls; see `SAEConfig.resolved`."""
        found = super().resolved(d_model, batch_tokens, train_tokens)
        if self.auxk_rows is not None:
            return found
        auxk = min(self.auxk or default_auxk(d_model), self.n_latents)
        return replace(found, auxk_rows=default_auxk_rows(auxk, batch_tokens))


def topk_settings(settings: SAEConfig) -> TopKConfig:
    """Return settings as a `TopKConfig`, for code that supports no other architecture.

    Raises:
        ConfigError: If the settings are those of another architecture.
    """
    if not isinstance(settings, TopKConfig) or settings.architecture != "topk":
        raise ConfigError("sae.architecture", settings.architecture, "topk")
    return settings


def default_auxk(d_model: int) -> int:
    """Return d_model / 2 rounded down to a power of two, at least 1."""
    half = max(d_model // 2, 1)
    return int(1 << (half.bit_length() - 1))


def default_auxk_rows(auxk: int, batch_tokens: int) -> float:
    """Return the largest of 1, 1/2, 1/4, ... at which the auxiliary path has few enough pairs.

    All rows give the best SAE, but memory and time of the path grow with its pairs, `auxk` for
    each row. At a d_model of 4096 and 32,768 rows they are 32 times those of the main path with k
    64. The rule depends on neither the machine nor the mesh, so that they do not change the result.

    Args:
        auxk: Dead latents selected per row.
        batch_tokens: Rows of the global batch.
    """
    share = 1.0
    while share * batch_tokens * auxk > MOST_AUX_PAIRS and share * batch_tokens > 1:
        share /= 2
    return share


TOPK = Architecture(
    settings=TopKConfig,
    training="sae_core.architectures.topk.training:TopKSAE",
    inference="sae_core.architectures.topk.inference:TopKInference",
    title="TopK",
    formula="relu(topk((x - b_dec) @ W_enc.T + b_enc)) @ W_dec + b_dec",
    metrics=(
        TrainingMetric(
            "auxk_loss",
            "",
            "fraction of the residual that the dead latents leave unexplained, mean over steps",
            mean_over_steps("auxk_loss"),
        ),
    ),
)
