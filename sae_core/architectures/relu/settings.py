"""Settings of the ReLU architecture, and its entry in the registry. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

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

    resample_every_tokens: int | None = None
    """Replace dead latents by inputs of high loss each time this many tokens have been trained on,
    rounded up to whole batches (Bricken et al. 2023). Null: never."""
    resample_until_tokens: int | None = None
    """No resampling after this many training tokens. If null, three quarters of `train.tokens`."""
    resample_warmup_tokens: int | None = None
    """After each resampling the learning rate rises from a tenth to its value along a cosine over
    this many tokens. If null, a tenth of `resample_every_tokens`."""

    def validate(self) -> None:
        """Validate all fields; see `PenaltyConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        require_at_least_0("l1_coef", self.l1_coef)
        for name in ("resample_every_tokens", "resample_until_tokens", "resample_warmup_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"sae.{name}", value, "at least 1, or null")
        if self.decoder_norm not in DECODER_NORMS:
            expected = f"one of: {', '.join(DECODER_NORMS)}"
            raise ConfigError("sae.decoder_norm", self.decoder_norm, expected)

    def resolved(self, d_model: int, batch_tokens: int, train_tokens: int) -> Self:
        """Return the settings with numbers in place of nulls; see `SAEConfig.resolved`."""
        found = super().resolved(d_model, batch_tokens, train_tokens)
        if found.resample_every_tokens is None:
            return found
        every = -(-found.resample_every_tokens // batch_tokens) * batch_tokens
        return replace(
            found,
            resample_every_tokens=every,
            resample_until_tokens=found.resample_until_tokens or train_tokens * 3 // 4,
            resample_warmup_tokens=found.resample_warmup_tokens or max(1, every // 10),
        )

    def resamples_at(self, tokens: int) -> bool:
        """Return True if dead latents are replaced in the step that starts after `tokens` tokens.

        The settings must be resolved.
        """
        every, until = self.resample_every_tokens, self.resample_until_tokens
        if every is None or until is None:
            return False
        return 0 < tokens <= until and tokens % every == 0

    def lr_share(self, tokens: int) -> float:
        """Return the factor of the learning rate, below 1 after a resampling."""
        every, warmup = self.resample_every_tokens, self.resample_warmup_tokens
        if every is None or warmup is None:
            return 1.0
        # The step that resamples has its own rate: it resamples after its update.
        since = (tokens - 1) % every + 1
        if not self.resamples_at(tokens - since) or since >= warmup:
            return 1.0
        return 0.1 + 0.9 * (1 - math.cos(math.pi * since / warmup)) / 2

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
