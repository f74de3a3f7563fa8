"""Settings of the ReLU architecture, and its entry in the registry. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError
from sae_core.architectures.penalty.settings import PenaltyConfig, require_at_least_0
from sae_core.architectures.registry import Architecture
from sae_core.training_metrics import TrainingMetric, mean_over_steps

DECODER_NORMS = ("unit", "penalty")


@dataclass
class ReLUConfig(PenaltyConfig):
    """Settings of a ReLU SAE."""

    architecture: str = "relu"
    """Name of the architecture in the registry."""
    l1_coef: float = 2.0
    """Weight of the L1 norm of the latents beside the squared error, for inputs whose mean squared
    norm is d_model. Both are divided by d_model, so that the squared error is the fraction of
    variance unexplained."""
    decoder_norm: str = "unit"
    """What keeps latents from becoming small and decoder rows large. unit: rows have unit norm
    after every update (Bricken et al. 2023). penalty: rows have any norm, and each latent is
    multiplied by its row's norm in the penalty (Anthropic, April 2024)."""

    def validate(self) -> None:
        """Validate all fields; see `PenaltyConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        require_at_least_0("l1_coef", self.l1_coef)
        if self.decoder_norm not in DECODER_NORMS:
            expected = f"one of: {', '.join(DECODER_NORMS)}"
            raise ConfigError("sae.decoder_norm", self.decoder_norm, expected)

    def has_unit_decoder(self) -> bool:
        """Return True with `decoder_norm=unit`."""
        return self.decoder_norm == "unit"


RELU = Architecture(
    settings=ReLUConfig,
    training="sae_core.architectures.relu.training:ReLUSAE",
    inference="sae_core.architectures.relu.inference:ReLUInference",
    title="ReLU",
    formula="relu((x - b_dec) @ W_enc.T + b_enc) @ W_dec + b_dec",
    metrics=(
        TrainingMetric(
            "l1_penalty",
            "",
            "penalty on the L1 norm of the latents, with its weight, mean over steps",
            mean_over_steps("l1_penalty"),
        ),
    ),
)
