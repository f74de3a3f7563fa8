"""Settings of logging."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class LoggingConfig:
    """How often to write metrics, and where to write them in addition to `metrics.jsonl`."""

    wandb: str = "auto"
    """Mode of Weights & Biases: auto (online if an API key is set, otherwise offline), online,
    offline or disabled."""
    wandb_project: str = "sae"
    """Project on Weights & Biases."""
    every_steps: int = 10
    """Number of optimiser steps from one row of metrics to the next."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid. The message names the field.
        """
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise ConfigError("logging.wandb", self.wandb, "auto, online, offline or disabled")
        if self.every_steps < 1:
            raise ConfigError("logging.every_steps", self.every_steps, "at least 1")
