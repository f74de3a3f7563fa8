"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class EvalConfig:
    """Evaluation on held-out text with the SAE spliced into the language model."""

    tokens: int = 32_768
    """Number of held-out tokens to evaluate on, rounded down to whole contexts (at least one)."""
    batch_contexts: int = 8
    """Number of contexts per forward pass of the language model."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a setting is invalid.
        """
        for name in ("tokens", "batch_contexts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name}", getattr(self, name), "at least 1")
