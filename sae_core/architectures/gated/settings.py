"""Settings of the Gated architecture, and its entry in the registry. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from sae_core.architectures.penalty.settings import PenaltyConfig, require_at_least_0
from sae_core.architectures.registry import Architecture, LatentVector
from sae_core.training_metrics import TrainingMetric, mean_over_steps


@dataclass
class GatedConfig(PenaltyConfig):
    """Settings of a Gated SAE."""

    architecture: str = "gated"
    """Name of the architecture in the registry."""
    l1_coef: float = 4.0
    """Weight of the L1 norm of the gates beside the squared error, for inputs whose mean squared
    norm is d_model. Both are divided by d_model, so that the squared error is the fraction of
    variance unexplained."""

    def validate(self) -> None:
        """Validate all fields; see `PenaltyConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        require_at_least_0("l1_coef", self.l1_coef)


GATED = Architecture(
    settings=GatedConfig,
    training="sae_core.architectures.gated.training:GatedSAE",
    inference="sae_core.architectures.gated.inference:GatedInference",
    title="Gated",
    formula=(
        "((p + b_enc > 0) * relu(exp(r_mag) * p + b_mag)) @ W_dec + b_dec, "
        "p = (x - b_dec) @ W_enc.T"
    ),
    metrics=(
        TrainingMetric(
            "l1_penalty",
            "",
            "penalty on the L1 norm of the gates, with its weight, mean over steps",
            mean_over_steps("l1_penalty"),
        ),
        TrainingMetric(
            "gate_loss",
            "",
            "auxiliary loss: squared error of the reconstruction from the gates, divided by "
            "d_model, mean over steps",
            mean_over_steps("gate_loss"),
        ),
    ),
    vectors=(
        LatentVector("r_mag", in_activation_units=False),
        LatentVector("b_mag", in_activation_units=True),
    ),
)
