"""Settings that the kinds with a sparsity penalty share. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from foundation.errors import ConfigError
from sae_core.architectures.settings import SAEConfig


@dataclass
class PenaltyConfig(SAEConfig):
    """Settings of an SAE whose loss has a penalty on the latents."""

    penalty_warmup_tokens: int | None = None
    """The coefficient of the penalty grows linearly from 0 over this many training tokens, because
    latents that are penalised before they have learned anything die. If null, a tenth of
    `train.tokens`; 0 disables it."""

    def validate(self) -> None:
        """Validate all fields; see `SAEConfig.validate`.

        Raises:
            ConfigError: If a value is out of range.
        """
        super().validate()
        require_at_least_0("penalty_warmup_tokens", self.penalty_warmup_tokens or 0)

    def resolved(self, d_model: int, batch_tokens: int, train_tokens: int) -> Self:
        """Return the settings with numbers in place of nulls; see `SAEConfig.resolved`."""
        found = super().resolved(d_model, batch_tokens, train_tokens)
        if found.penalty_warmup_tokens is not None:
            return found
        return replace(found, penalty_warmup_tokens=train_tokens // 10)

    def penalty_share(self, tokens: int) -> float:
        """Return the share of the full penalty in the step that starts after `tokens` tokens."""
        if not self.penalty_warmup_tokens:
            return 1.0
        return min(1.0, tokens / self.penalty_warmup_tokens)


def require_at_least_0(name: str, value: float) -> None:
    """Check the value of a setting.

    Raises:
        ConfigError: If it is negative or not a number.
    """
    if not value >= 0:
        raise ConfigError(f"sae.{name}", value, "0 (off) or more")
