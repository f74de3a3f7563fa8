"""What a user may set about evaluation, resharding and scaling laws. No torch import here."""

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
class FitConfig:
    """Scaling laws over the runs of a sweep."""

    runs: str | None = None
    """A folder of runs, or a pattern of run folders (quote its `*`); stage=fit needs it."""
    metric: str = "fvu"
    """fvu or loss (mean of the last 5% of the training log), or heldout_fvu (of stage=evaluate)."""
    hold_out: str = "largest"
    """largest: fit again without the largest n and forecast it; none."""
    bootstrap: int = 1000
    """Replicates behind each interval."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        metrics = ("fvu", "loss", "heldout_fvu")
        if self.metric not in metrics:
            raise ConfigError("fit.metric", self.metric, f"one of {', '.join(metrics)}")
        if self.hold_out not in ("largest", "none"):
            raise ConfigError("fit.hold_out", self.hold_out, "largest or none")
        if self.bootstrap < 100:
            raise ConfigError("fit.bootstrap", self.bootstrap, "at least 100 for 95% intervals")


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
