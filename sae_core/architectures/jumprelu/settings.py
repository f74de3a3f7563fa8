"""Settings of the JumpReLU architecture, and its entry in the registry. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError
from sae_core.architectures.penalty.settings import PenaltyConfig, require_at_least_0
from sae_core.architectures.registry import Architecture, LatentVector
from sae_core.training_metrics import TrainingMetric, mean_over_steps


@dataclass
class JumpReLUConfig(PenaltyConfig):
    """Settings of a JumpReLU SAE."""

    architecture: str = "jumprelu"
    """Name of the architecture in the registry."""
    l0_coef: float = 1e-3
    """Weight of the penalty on the number of active latents, beside the squared error as a fraction
    of the variance. Without `l0_target` the penalty is l0_coef * L0."""
    l0_target: float | None = None
    """Number of active latents per token to train towards: the penalty is then
    l0_coef * (L0 / l0_target - 1)^2, with the L0 of the global batch (Gemma Scope 2), and l0_coef
    should be about 1. Null: none."""
    bandwidth: float = 0.1
    """Width of the kernel that estimates the gradient of the thresholds, in units of the normalised
    inputs, whose coordinates have unit mean square. Wider is less noisy and more biased."""
    initial_l0: float = 32.0
    """Number of active latents per token at the start. Each threshold is set so that its latent is
    active on the same fraction of a sample."""

    def validate(self) -> None:
        """Validate all fields; see `PenaltyConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        require_at_least_0("l0_coef", self.l0_coef)
        if self.l0_target is not None and not 0 < self.l0_target <= self.n_latents:
            raise ConfigError(
                "sae.l0_target",
                self.l0_target,
                f"more than 0 and at most sae.n_latents={self.n_latents}, or null",
            )
        if not self.bandwidth > 0:
            raise ConfigError("sae.bandwidth", self.bandwidth, "more than 0")
        if not self.initial_l0 > 0:
            raise ConfigError("sae.initial_l0", self.initial_l0, "more than 0")


JUMPRELU = Architecture(
    settings=JumpReLUConfig,
    training="sae_core.architectures.jumprelu.training:JumpReLUSAE",
    inference="sae_core.architectures.jumprelu.inference:JumpReLUInference",
    title="JumpReLU",
    formula="jumprelu((x - b_dec) @ W_enc.T + b_enc, threshold) @ W_dec + b_dec",
    metrics=(
        TrainingMetric(
            "l0_penalty",
            "",
            "penalty on the number of active latents, with its weight, mean over steps",
            mean_over_steps("l0_penalty"),
        ),
    ),
    vectors=(LatentVector("threshold", in_activation_units=True),),
)
