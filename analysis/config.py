"""What a user may set about evaluation and resharding. No torch import here."""

from __future__ import annotations

from dataclasses import dataclass

from sae_core.errors import ConfigError


@dataclass
class EvalConfig:
    """Held-out evaluation with the SAE spliced into the language model."""

    tokens: int = 32_768
    """Held-out tokens; whole contexts, at least one."""
    batch_contexts: int = 8

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        for name in ("tokens", "batch_contexts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name}", getattr(self, name), "at least 1")


@dataclass
class ReshardConfig:
    """Rewriting the newest checkpoint with another number of files."""

    shards: int = 1
    """Files for weights, and as many for the optimiser's moments."""
    to: str | None = None
    """Folder that gets `step-N/`; null: `resharded/` in the run's folder."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if self.shards < 1:
            raise ConfigError("reshard.shards", self.shards, "at least 1")
